"""Holds what the tests' PTX machine counts against the counters of the chip.

Sectors and requests of global memory, wavefronts and conflicts of shared memory. Runs
itself under `ncu`, which reads the counters of every launch. Needs a GPU, ncu and
cuobjdump.
"""

import argparse
import csv
import functools as ft
import io
import subprocess
import sys
from typing import Any

import jax

import jax_gdn
from tests.cases import Case
from tests.kernels import launch, module

from .machine import machine
from .options import output_file, write_json

# What is counted: by the chip, under that name; by the machine.
METRICS = {
    "sectors loaded": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "sectors stored": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "requests of loads": "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "requests of stores": "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum",
    "shared wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}


def cases() -> list[Case]:
    """A call for each kernel of K = 128, which are those that were tuned."""
    kernels = (one for one in module.instances() if one.K == 128)
    return [launch.planned_case(one) for one in kernels]


def of_machine(case: Case) -> tuple[str, dict[str, int]]:
    """Returns the kernel, and its counts."""
    result = launch.run(case)
    counters = result.counters
    traffic, shared = counters.traffic.values(), counters.shared.values()
    counts = {
        "sectors loaded": sum(t.sectors for t in traffic if not t.is_write),
        "sectors stored": sum(t.sectors for t in traffic if t.is_write),
        "requests of loads": sum(t.requests for t in traffic if not t.is_write),
        "requests of stores": sum(t.requests for t in traffic if t.is_write),
        "shared wavefronts": sum(t.wavefronts for t in shared),
        "bank conflicts": sum(t.conflicts for t in shared),
    }
    return result.plan["symbol"], counts


def run_on_chip() -> None:
    """Launches every case, one kernel each."""
    for case in cases():
        arrays = jax.device_put(case.inputs())
        call = ft.partial(jax_gdn.decode, **case.settings, implementation="native")
        jax.block_until_ready(jax.jit(call)(**arrays))


def of_chip() -> list[tuple[str, dict[str, int]]]:
    """Returns the kernel and its counts, a launch at a time."""
    output = subprocess.run(
        [
            *("ncu", "--clock-control", "none", "--csv", "--page", "raw"),
            *("--kernel-name", "regex:^gdn_"),
            *("--metrics", ",".join(METRICS.values())),
            *(sys.executable, "-m", "benchmarks", "counters", "--launch"),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    table = output[output.index('"ID"') :]
    rows = list(csv.DictReader(io.StringIO(table)))[1:]  # the first has units
    return [
        (
            row["Kernel Name"],
            {name: int(row[m].replace(",", "")) for name, m in METRICS.items()},
        )
        for row in rows
    ]


def compare() -> list[dict[str, Any]]:
    results = []
    for case, (kernel, chip) in zip(cases(), of_chip(), strict=True):
        symbol, machine = of_machine(case)
        if symbol != kernel:
            raise RuntimeError(f"the chip ran {kernel}, the machine {symbol}")
        results.append(
            {"kernel": kernel, "case": case.id, "chip": chip, "machine": machine}
        )
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    if given.launch:
        return run_on_chip()
    results = compare()
    for result in results:
        print(f"{result['kernel']}, {result['case']}; chip / machine:")
        print(
            "  "
            + ", ".join(
                f"{name} {result['chip'][name]:,} / {result['machine'][name]:,}"
                for name in METRICS
            )
        )
    write_json({"machine": machine(), "results": results}, given.json)
    return None
