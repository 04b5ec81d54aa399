"""What the README shows runs, and what it says is so."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import jax_gdn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order():
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, scope)
    assert scope["out"].shape == (2, 1, 32, 128)


def test_argument_table_is_the_signature():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted(inspect.signature(jax_gdn.decode).parameters)


def test_decode_loop_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "decode_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "same buffer: True" in printed
    assert "same bits True" in printed


@pytest.mark.parametrize("name", ["continuous_batching", "speculative_decoding"])
def test_server_examples(name, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert re.search(r"bitwise [a-z ]+: True", capsys.readouterr().out)
