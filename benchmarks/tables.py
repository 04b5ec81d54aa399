"""Writes the tables of README.md and docs/ from the JSON of benchmarks/results.

A page has `<!-- table NAME -->` and `<!-- /table -->` around each; what stands between
is replaced. With `--check` nothing is written: it ends with 1 where a page and its JSON
disagree.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import bench_report
from .layers import FEW

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

Report = dict[str, Any]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(us: float | None) -> str:
    """Microseconds with three digits, or four above a hundred."""
    if us is None:
        return ""
    digits = 2 if us < 10 else 1
    return f"{us:,.{digits}f}"


def replay(report: Report) -> str:
    """Kernels alone, us, beside the best in-place pass; percent of it where T = 1."""
    results = report["results"]
    batches = sorted({one["B"] for one in results})
    rows = []
    for state in dict.fromkeys(one["state_dtype"] for one in results):
        of = {one["B"]: one for one in results if one["state_dtype"] == state}
        best = [_number(of[B]["roofline_us"]) if B in of else "" for B in batches]
        rows.append([f"in-place pass, {state}", *best])
        timed = [row for one in of.values() for row in one["rows"].items()]
        names = dict.fromkeys(name for name, times in timed if times["kernel"])
        for name in sorted(names, key=lambda x: ("T=4" in x, "," in x, x)):
            cells = []
            for B in batches:
                found = of.get(B, {"rows": {}})["rows"].get(name)
                text = _number(found and found["median_us"])
                if found and name.endswith("T=1"):
                    text += f", {found['of_roofline']:.1%}"
                cells.append(text)
            layout, form = name.split(" ", 1)
            form = form.removeprefix("T=1").removeprefix(", ").replace("T=4", "T = 4")
            rows.append([", ".join(filter(None, (f'"{layout}"', state, form))), *cells])
    return _table(["us a call, B =", *map(str, batches)], rows)


def short(report: Report) -> str:
    """The first rows of `replay`, for README."""
    lines = replay(report).splitlines()
    wanted = ("in-place pass, float32", '"KV", float32', '"VK", float32')
    wanted += ('"KV", bfloat16',)
    rows = [line for line in lines for name in wanted if line.startswith(f"| {name} |")]
    return "\n".join([*lines[:2], *rows])


PEERS = {
    "in-place pass, float32": "in-place pass, float32",
    "jax_gdn native": '`decode`, "KV"',
    "jax_gdn native, V-major": '`decode`, "VK"',
    "FlashInfer, K-major": "FlashInfer, K-major",
    "FlashInfer, V-major": "FlashInfer, V-major",
    "flash-linear-attention": "flash-linear-attention",
    "lalamo (Pallas)": "lalamo (Pallas)",
    "ggml (llama-cpp-python)": "ggml",
    "transformers (torch)": "torch, as transformers writes it",
    "onnxruntime": "onnxruntime",
    "jax_gdn reference, donated": "the reference, donated",
    "in-place pass, bfloat16": "in-place pass, bfloat16",
    "jax_gdn native, bfloat16": '`decode`, "KV", bfloat16',
    "jax_gdn native, V-major, bfloat16": '`decode`, "VK", bfloat16',
    "FlashInfer, bfloat16 state": "FlashInfer, bfloat16",
}


def compare(report: Report) -> str:
    """Implementations beside one another, us a call."""
    times = {(x["peer"], x["B"]): x["median"] for x in report["rows"] if "median" in x}
    batches = sorted({B for _, B in times})
    rows = [
        [text, *(_number(times.get((peer, B))) for B in batches)]
        for peer, text in PEERS.items()
        if any((peer, B) in times for B in batches)
    ]
    return _table(["us a call, B =", *map(str, batches)], rows)


LAYERS = {
    "kernel alone": "kernel alone",
    "looped, command buffers": "looped on the device: a list of states",
    "looped, a stack": "a stack, `layer` a number",
    "looped, one pool": "one pool, constant slots",
    "looped, a stack a row": "a stack a row, `[B, L, ...]`, mapped over rows",
    "looped, a scan over a stack, 8 unrolled": "a scan over a stack, `unroll=8`",
    "looped, a scan over a stack, command buffers": "a scan over a stack, its loop in "
    "a command buffer",
    "looped, a scan over a stack": "a scan over a stack, XLA's defaults",
    "looped, states as xs and ys": "a scan with the states as xs and ys",
    "looped, deferred writes": "a list of states, writes deferred",
    "looped, none": "a list of states, no command buffers",
    "stepped, a list": "stepped from Python: a list of states",
    "stepped, a stack": "a stack, `layer` a number",
    "stepped, one pool": "one pool, constant slots",
    "the same, x not donated": "a list, last output not donated",
    "the same, no command buffers": "a list, no command buffers",
    "nothing, one pool": "a program that does nothing, one pool",
    "nothing, a list": "a program that does nothing, a list",
}


def layers(report: Report) -> str:
    """A step of many layers, us a layer, with quartiles where 5 % apart."""
    results = report["results"]

    def cell(row: Report | None) -> str:
        if row is None:
            return ""
        us, (low, high) = row["us_a_layer"], row["quartiles"]
        wide = high - low > 0.05 * us
        return f"{us:.1f}" + (f" ({low:.1f} to {high:.1f})" if wide else "")

    head = [f"B = {one['B']}, {one['layers']} layers" for one in results]
    rows = [
        [text, *(cell(one["rows"].get(name)) for one in results)]
        for name, text in LAYERS.items()
        if any(name in one["rows"] for one in results)
    ]
    return _table(["us a layer", *head], rows)


def few_layers(report: Report) -> str:
    """The rows of `layers` that are measured at any size."""
    results = report["results"]
    few = [{**one, "rows": {n: one["rows"][n] for n in FEW}} for one in results]
    return layers({"results": few})


def deferred(report: Report) -> str:
    """`decode_deferred` over a window's cycle, us; times faster than what it replaces.

    That is `decode`, and with several tokens `decode` with a snapshot after each. The
    percentage is of the roofline of the call's own bytes.
    """
    results = report["results"]
    batches = sorted({one["B"] for one in results})
    forms = dict.fromkeys((x["state_dtype"], x["layout"], x["T"]) for x in results)
    rows = []
    for state, layout, T in sorted(
        forms, key=lambda x: (x[2], x[0] != "float32", x[1])
    ):
        form = f'"{layout}", {state}, T = {T}'
        of = {
            one["B"]: one["rows"]
            for one in results
            if (one["state_dtype"], one["layout"], one["T"]) == (state, layout, T)
        }
        for name, text in DEFERRED.items():
            if not any(name in timed for timed in of.values()):
                continue
            cells = []
            for B in batches:
                row = of.get(B, {}).get(name)
                cell = _number(row and row["median_us"])
                if row and name == "whole cycle" and "times_faster" in row:
                    cell += f", {row['times_faster']:.2f} x"
                    cell += f", {row['of_roofline']:.0%}"
                cells.append(cell)
            rows.append([f"{form}: {text}", *cells])
    return _table(["us a call, B =", *map(str, batches)], rows)


DEFERRED = {
    "decode": "`decode`",
    "snapshots": "`decode`, snapshots",
    "whole cycle": "deferred",
    "no row folds": "deferred, no row folds",
    "all rows fold": "deferred, all rows fold",
}


def drift(report: Report) -> str:
    """Errors of a stored state, and of the output, after many steps."""
    rows = [
        [
            x["remembers"],
            x["state"],
            x["error of"],
            *(f"{x[n]:.1e}" for n in x if "steps" in n),
        ]
        for x in report["drift"]
    ]
    head = ("the state remembers", "state", "error of", "after 1 step", "100 steps")
    return _table([*head, "1000 steps"], rows)


def speculation(report: Report) -> str:
    """Ways to roll back, us a call of T tokens."""
    timed = {(x["B"], x["T"], x["way"]): x for x in report["speculation"]}
    forms = list(dict.fromkeys(key[:2] for key in timed))
    rows = []
    for way in dict.fromkeys(key[2] for key in timed):
        slots = "T + 1" if way == "snapshots" else "1"
        times = (_number(timed[*form, way]["median_us"]) for form in forms)
        rows.append([way, slots, *times])
    head = (f"B = {B}, T = {T}" for B, T in forms)
    return _table(["us", "slots a row", *head], rows)


def gradients(report: Report) -> str:
    """Memory of a reverse pass in states, and its time."""
    rows = [
        [x["form"], f"{x['states']:.1f}", f"{x['median_us'] / 1000:.2f}"]
        for x in report["gradients"]
    ]
    return _table(["16 tokens, B = 1", "memory, states", "ms"], rows)


def scaling(report: Report) -> str:
    """A step of many layers on several devices, us a layer."""
    head = [f"B = {one['B']} a device" for one in report["results"]]
    return _each_way(
        report, ["us a layer", *head], lambda row: f"{row['us_a_layer']:.1f}"
    )


def prefill(report: Report) -> str:
    """Ways to take a prompt, ms a call."""
    head = [f"{one['B']} x {one['T']}" for one in report["results"]]
    return _each_way(
        report,
        ["ms a call, B x T =", *head],
        lambda row: f"{row['median_us'] / 1000:.2f}",
    )


def _each_way(report: Report, head: list[str], cell: Callable[[Report], str]) -> str:
    """A row for each way, a column for each size."""
    results = report["results"]
    return _table(
        head,
        (
            [way, *(cell(one["rows"][way]) for one in results)]
            for way in results[0]["rows"]
        ),
    )


def bench(report: Report) -> str:
    rows = map(bench_report.line, report["results"])
    footer = bench_report.footer(report)
    return "\n".join([bench_report.heading(report), *rows, footer])


# The JSON of each table, and who writes it.
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "readme-h100": ("h100/replay", short),
    "replay-h100": ("h100/replay", replay),
    "replay-h200": ("h200/replay", replay),
    "compare-h200": ("h200/compare", compare),
    "compare-h200-warm": ("h200/compare-warm", compare),
    "compare-h100": ("h100/compare", compare),
    "compare-host": ("host/compare", compare),
    "layers-h200": ("h200/layers", layers),
    "layers-h100": ("h100/layers", layers),
    "layers-deferred-h200": ("h200/layers-deferred", few_layers),
    "scaling-h200": ("h200/scaling", scaling),
    "speculation-h200": ("h200/costs", speculation),
    "speculation-host": ("host/costs", speculation),
    "speculation-h100": ("h100/costs", speculation),
    "gradients-h200": ("h200/costs", gradients),
    "gradients-host": ("host/costs", gradients),
    "deferred-h200": ("h200/deferred", deferred),
    "deferred-h100": ("h100/deferred", deferred),
    "prefill-host": ("host/prefill", prefill),
    "drift": ("host/accuracy", drift),
    "bench-host": ("host/bench", bench),
}


def written(page: str) -> str:
    """Returns a page with its tables as the JSON has them."""

    def fill(match: re.Match) -> str:
        file, write = TABLES[match[1]]
        text = write(json.loads((RESULTS / f"{file}.json").read_text("utf-8")))
        return f"<!-- table {match[1]} -->\n{text}\n<!-- /table -->"

    marks = r"<!-- table ([\w-]+) -->\n.*?<!-- /table -->"
    return re.sub(marks, fill, page, flags=re.DOTALL)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing")


def run(options: argparse.Namespace) -> None:
    stale = []
    for path in PAGES:
        page = path.read_text("utf-8")
        if (new := written(page)) != page:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(new, "utf-8")
    if stale and options.check:
        raise SystemExit(f"not as benchmarks/results has it: {', '.join(stale)}")
