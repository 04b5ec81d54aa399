"""What README and docs show runs, and what they say is so."""

import inspect
import re
import runpy
from pathlib import Path

import jax
import pytest

import jax_gdn
from benchmarks import tables

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in tables.PAGES}
BLOCKS = {
    name: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name, text in PAGES.items()
}


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_python_blocks_run_in_order(page):
    scope: dict = {}
    # As a user has them.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in BLOCKS[page]:
            exec(block, scope)


def test_pages_have_their_blocks():
    count = {name: len(blocks) for name, blocks in BLOCKS.items() if blocks}
    assert count == {
        "README.md": 1,
        "docs/deferred.md": 3,
        "docs/models.md": 6,
        "docs/prefill.md": 2,
        "docs/serving.md": 7,
        "docs/transformations.md": 1,
    }


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_argument_table_is_the_signature():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGES["docs/api.md"], re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted(inspect.signature(jax_gdn.decode).parameters)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in heads}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([\w-]*)\)", text):
        if "://" not in target:
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), target
            if anchor:
                assert anchor in anchors(path.read_text("utf-8")), anchor


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page):
    assert tables.written(PAGES[page]) == PAGES[page]


def test_every_table_has_its_page():
    text = "".join(PAGES.values())
    assert sorted(re.findall(r"<!-- table ([\w-]+) -->", text)) == sorted(tables.TABLES)


def test_decode_loop_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "decode_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "same buffer: True" in printed
    assert "same bits True" in printed


def test_scanned_layers_example(capsys, host):
    path = str(ROOT / "examples" / "scanned_layers.py")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(path, run_name="__main__")
    printed = capsys.readouterr().out
    assert "same buffer: True" in printed
    assert "same tokens: True" in printed
    assert len(set(printed.split("sequence:")[1].split())) > 4


def test_continuous_batching_example(capsys):
    path = str(ROOT / "examples" / "continuous_batching.py")
    runpy.run_path(path, run_name="__main__")
    assert re.search(r"bitwise [a-z ]+: True", capsys.readouterr().out)


def test_speculative_decoding_example(capsys):
    path = str(ROOT / "examples" / "speculative_decoding.py")
    runpy.run_path(path, run_name="__main__")
    ways = re.findall(
        r"(\w+): .*the tokens of one by one: (\w+); bitwise: (\w+)",
        capsys.readouterr().out,
    )
    assert [way[:2] for way in ways] == [
        ("Snapshots", "True"),
        ("DeferredWrites", "True"),
    ]
    assert ways[0][2] == "True"
