"""What `jax-gdn bench` shows: a table, a picture, a file, the README's table."""

import importlib
import json
from pathlib import Path
from typing import Any

README_BEGIN = "<!-- bench -->"
README_END = "<!-- /bench -->"
COLUMNS = (
    *("heads", "B", "T", "state", "time, us", "quartiles", "GB/s"),
    *("limit, us", "of the limit", "XLA form, us", "donated", "times faster"),
)

Result = dict[str, Any]


def require(*modules: str) -> None:
    """Raises `ImportError`, naming the extra, unless these are installed."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"jax-gdn bench needs {name}, which is not installed: "
                "pip install 'jax-gdn[bench]'"
            ) from error


def cells(result: Result) -> list[str]:
    """Returns one row of the table, as text, in the order of COLUMNS."""
    native = result["timings"]["native"]
    xla = result["timings"][result["xla"]]
    low, high = native["quartiles_us"]
    return [
        f"{result['H']}/{result['HV']}",
        str(result["B"]),
        str(result["T"]),
        f"{result['state_dtype']} {result['layout']}",
        f"{native['median_us']:,.1f}",
        f"{low:,.1f} to {high:,.1f}",
        f"{result['GB/s']:,.1f}",
        f"{result['timings']['limit']['median_us']:,.1f}",
        f"{result['of_limit']:.0%}",
        f"{xla['median_us']:,.1f}",
        "yes" if result["xla"] == "XLA donated" else "no",
        f"{result['times_faster']:.1f}",
    ]


def headline(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = machine["device"]
    if where.endswith("(cpu)"):
        where = f"{machine['cpu']}, {machine['cpu_threads']} threads"
    return f"{where}; jax {machine['jax']}; {report['cache']}"


def overhead_text(overhead: dict[str, Any]) -> list[str]:
    decode, no_op = (
        overhead["timings"][name]["median_us"] for name in ("decode", "no-op")
    )
    return [
        f"a call with B 1 and tiny heads: {decode:.1f} us, a no-op with the same "
        f"arguments: {no_op:.1f} us, ratio {overhead['ratio']:.2f} (at most 1.3)",
        f"importing jax_gdn after jax: {overhead['import_ms']:.0f} ms (at most 100)",
    ]


def print_table(report: dict[str, Any], console: Any) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=headline(report), title_justify="left", box=box.SIMPLE)
    for column in COLUMNS:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in report["results"]:
        table.add_row(*cells(result))
    console.print(table)
    for result in report["results"]:
        if stepped := result["timings"].get("native, stepped from Python"):
            console.print(
                f"{result['family']}, B {result['B']}: stepped from Python under "
                f"command buffers {stepped['median_us']:,.1f} us"
            )
    for line in overhead_text(report["overhead"]):
        console.print(line, highlight=False)


def write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_readme(report: dict[str, Any], path: Path) -> None:
    """Puts the table between the two markers, in place of what was there."""
    text = path.read_text(encoding="utf-8")
    check_readme(path)
    before, rest = text.split(README_BEGIN)
    _, after = rest.split(README_END)
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, report["results"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    overhead = "\n".join(f"- {line}" for line in overhead_text(report["overhead"]))
    block = f"{headline(report)}:\n\n{table}\n\n{overhead}"
    path.write_text(
        f"{before}{README_BEGIN}\n{block}\n{README_END}{after}", encoding="utf-8"
    )


def check_files(json_file: Path | None, plot: Path | None, readme: Path | None) -> None:
    """Raises `ValueError` for a file that could not be written when all is timed."""
    named = {"--json": json_file, "--plot": plot, "--readme": readme}
    for option, path in named.items():
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"jax-gdn bench: {option}: cannot write a file {path}")
    if plot and plot.suffix != ".png":
        raise ValueError(f"jax-gdn bench: --plot: must end in .png, got {plot}")
    if readme:
        check_readme(readme)


def check_readme(path: Path) -> None:
    """Raises `ValueError` unless there is one pair of markers, in order."""
    if not path.exists():
        raise ValueError(f"jax-gdn bench: --readme: there is no file {path}")
    text = path.read_text(encoding="utf-8")
    found = [text.count(marker) for marker in (README_BEGIN, README_END)]
    if found != [1, 1] or text.index(README_BEGIN) > text.index(README_END):
        raise ValueError(
            f"jax-gdn bench: --readme: {path} must have one {README_BEGIN} and after "
            f"it one {README_END}; it has {found[0]} and {found[1]}"
        )


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Draws time, and percent of the limit, against the batch size; a row each T."""
    from matplotlib.figure import Figure

    lengths = sorted({result["T"] for result in report["results"]})
    figure = Figure(figsize=(11, 2 + 4.5 * len(lengths)), layout="constrained")
    rows = figure.subplots(len(lengths), 2, squeeze=False)
    for (times, shares), T in zip(rows, lengths, strict=True):
        _draw(times, shares, [r for r in report["results"] if r["T"] == T])
        tokens = "1 token" if T == 1 else f"{T} tokens"
        times.set(title=f"time of a call, us; {tokens}", yscale="log")
        shares.set(title=f"percent of the limit; {tokens}")
    figure.suptitle(headline(report))
    figure.savefig(path, dpi=150)


def _draw(times: Any, shares: Any, results: list[Result]) -> None:
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(result["family"], []).append(result)
    for i, (family, members) in enumerate(families.items()):
        color, batches = f"C{i}", [result["B"] for result in members]

        def medians(name: str, members: list[Result] = members) -> list[float]:
            return [
                r["timings"][r["xla"] if name == "xla" else name]["median_us"]
                for r in members
            ]

        times.plot(batches, medians("native"), "o-", color=color, label=family)
        times.plot(batches, medians("xla"), "s--", color=color, alpha=0.6)
        times.plot(batches, medians("limit"), "x:", color=color)
        share = [100 * result["of_limit"] for result in members]
        shares.plot(batches, share, "o-", color=color)
    times.plot([], [], "s--", color="gray", label="XLA form, the better one")
    times.plot([], [], "x:", color="gray", label="in-place pass, the limit")
    times.legend(fontsize="small")
    shares.axhline(100, color="gray", linestyle=":")
    shares.set_ylim(bottom=0)
    ticks = sorted({result["B"] for result in results})
    for axes in (times, shares):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("sequences, B")
        axes.grid(alpha=0.3)
