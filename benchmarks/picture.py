"""Draws what `compare --json` wrote: percent of the in-place pass, by batch size.

One panel a state dtype, one line an implementation; the pass over the same bytes in the
same run is 100. Needs matplotlib, no GPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from .options import picture_file

STATES = ("float32", "bfloat16")
PASS = "in-place pass, "
OWN = "jax_gdn native"
# An implementation of 16-bit states has them in its name.
NAMES = {OWN: "decode, KV", f"{OWN}, V-major": "decode, VK"}
NAMES |= {"jax_gdn reference, donated": "reference, donated"}


def lines(rows: list[dict[str, Any]], state: str) -> dict[str, dict[int, float]]:
    """Returns for each implementation, by B, how much of the pass's speed it has."""
    timed = [row for row in rows if "median" in row]
    roof = {row["B"]: row["median"] for row in timed if row["peer"] == PASS + state}
    result: dict[str, dict[int, float]] = {}
    for row in timed:
        peer = row["peer"]
        if peer.startswith(PASS) or row["B"] not in roof:
            continue
        if ("bfloat16" in peer) == (state == "bfloat16"):
            name = peer.removesuffix(" state").removesuffix(", bfloat16")
            percent = 100 * roof[row["B"]] / row["median"]
            result.setdefault(NAMES.get(name, name), {})[row["B"]] = percent
    return result


def draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 14}):  # as wide as a telephone, and legible there
        figure = Figure(figsize=(6, 9), layout="constrained")
        panels = figure.subplots(len(STATES), 1, height_ratios=(3, 2))
        for axes, state in zip(panels, STATES, strict=True):
            of_pass = lines(report["rows"], state)
            for name, shares in of_pass.items():
                batches = sorted(shares)
                style = "o-" if name.startswith("decode") else "s--"
                axes.plot(batches, [shares[B] for B in batches], style, label=name)
            ticks = sorted({B for shares in of_pass.values() for B in shares})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set(title=f"{state} states", ylabel="% of the pass", ylim=(0, None))
            axes.axhline(100, color="gray", linestyle=":")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=12, ncols=2, loc="lower right")
        panels[-1].set(xlabel="sequences, B")
        machine = report["machine"]
        name = machine["device"].removesuffix(" (gpu)")
        figure.suptitle(f"{name}, jax {machine['jax']}, 16/32 heads", fontsize=14)
        figure.savefig(path, dpi=100)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=picture_file)


def run(given: argparse.Namespace) -> None:
    draw(json.loads(given.json.read_text(encoding="utf-8")), given.picture)
