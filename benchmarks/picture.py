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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, len(STATES), sharey=True)
    for axes, state in zip(panels, STATES, strict=True):
        of_pass = lines(report["rows"], state)
        for name, shares in of_pass.items():
            batches = sorted(shares)
            style = "o-" if name.startswith("decode") else "s--"
            axes.plot(batches, [shares[B] for B in batches], style, label=name)
        ticks = sorted({B for shares in of_pass.values() for B in shares})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="sequences, B", title=f"{state} states")
        axes.axhline(100, color="gray", linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(
            fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12)
        )
    panels[0].set(ylabel="percent of an in-place pass", ylim=(0, None))
    machine = report["machine"]
    figure.suptitle(
        f"{machine['device']}; jax {machine['jax']}; 16/32 heads, one token"
    )
    figure.savefig(path, dpi=150)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=picture_file)


def run(given: argparse.Namespace) -> None:
    draw(json.loads(given.json.read_text(encoding="utf-8")), given.picture)
