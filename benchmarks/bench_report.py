"""What `bench` shows: a table in Markdown, a picture."""

from pathlib import Path
from typing import Any

COLUMNS = (
    *("heads", "B", "T", "state", "time, us", "quartiles", "GB/s"),
    *("roofline, us", "of roofline", "reference, us", "donated", "times faster"),
)

Result = dict[str, Any]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(report: dict[str, Any]) -> str:
    """Returns where it was timed, and the first lines of the table."""
    rows = _row(COLUMNS), _row(("---",) * len(COLUMNS))
    return "\n".join((f"{headline(report)}:\n", *rows))


def line(result: Result) -> str:
    """Returns one row of the table."""
    native = result["timings"]["native"]
    reference = result["timings"][result["best_reference"]]
    low, high = native["quartiles_us"]
    cells = (
        f"{result['H']}/{result['HV']}",
        str(result["B"]),
        str(result["T"]),
        result.get("form", f"{result['state_dtype']} {result['layout']}"),
        f"{native['median_us']:,.1f}",
        f"{low:,.1f} to {high:,.1f}",
        f"{result['GB/s']:,.1f}",
        f"{result['timings']['roofline']['median_us']:,.1f}",
        f"{result['of_roofline']:.0%}",
        f"{reference['median_us']:,.1f}",
        "yes" if result["best_reference"] == "reference, donated" else "no",
        f"{result['times_faster']:.1f}",
    )
    return _row(cells)


def footer(report: dict[str, Any]) -> str:
    """Returns what stands below the table."""
    lines = [
        f"- {result['family']}, B {result['B']}: stepped from Python under command "
        f"buffers {stepped['median_us']:,.1f} us"
        for result in report["results"]
        if (stepped := result["timings"].get("native, stepped from Python"))
    ]
    overhead = report["overhead"]
    decode, no_op = (
        overhead["timings"][name]["median_us"] for name in ("decode", "no-op")
    )
    lines += [
        f"- a call with B 1 and tiny heads: {decode:.1f} us, a no-op with the same "
        f"arguments: {no_op:.1f} us, ratio {overhead['ratio']:.2f} (at most 1.3)",
        f"- importing jax_gdn after jax: {overhead['import_ms']:.0f} ms (at most 100)",
    ]
    return "\n".join(["", *lines])


def headline(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = machine["device"]
    if where.endswith("(cpu)"):
        where = f"{machine['cpu']}, {machine['cpu_threads']} threads"
    return f"{where}; jax {machine['jax']}; {report['cache']}"


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Draws time, and percent of the roofline, against the batch size; a row each T."""
    from matplotlib.figure import Figure

    lengths = sorted({result["T"] for result in report["results"]})
    figure = Figure(figsize=(11, 2 + 4.5 * len(lengths)), layout="constrained")
    rows = figure.subplots(len(lengths), 2, squeeze=False)
    for (times, shares), T in zip(rows, lengths, strict=True):
        _draw(times, shares, [r for r in report["results"] if r["T"] == T])
        tokens = "1 token" if T == 1 else f"{T} tokens"
        times.set(title=f"time of a call, us; {tokens}", yscale="log")
        shares.set(title=f"percent of the roofline; {tokens}")
    figure.suptitle(headline(report))
    figure.savefig(path, dpi=150)


def _draw(times: Any, shares: Any, results: list[Result]) -> None:
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(result["family"], []).append(result)
    for i, (family, members) in enumerate(families.items()):
        color, batches = f"C{i}", [result["B"] for result in members]

        def medians(name: str, members: list[Result] = members) -> list[float]:
            return [r["timings"][r.get(name, name)]["median_us"] for r in members]

        times.plot(batches, medians("native"), "o-", color=color, label=family)
        times.plot(batches, medians("best_reference"), "s--", color=color, alpha=0.6)
        times.plot(batches, medians("roofline"), "x:", color=color)
        share = [100 * result["of_roofline"] for result in members]
        shares.plot(batches, share, "o-", color=color)
    times.plot([], [], "s--", color="gray", label="reference, donated or not")
    times.plot([], [], "x:", color="gray", label="in-place pass")
    times.legend(fontsize="small")
    shares.axhline(100, color="gray", linestyle=":")
    shares.set_ylim(bottom=0)
    ticks = sorted({result["B"] for result in results})
    for axes in (times, shares):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("sequences, B")
        axes.grid(alpha=0.3)
