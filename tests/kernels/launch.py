"""The library's own launch plan, run over NumPy arrays placed at fake addresses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from jax_gdn import _registration
from jax_gdn._operands import GATE_FORMS, GIVEN_GATES
from tests.cases import LAYOUTS, Case
from tests.kernels import module
from tests.ptxcheck import fault, machine
from tests.ptxcheck.counters import Counters
from tests.ptxcheck.lanes import Launch
from tests.ptxcheck.memory import Buffer, GlobalMemory
from tests.ptxcheck.parser import parse
from tests.ptxcheck.program import Program

# Buffers lie 5 GiB apart: an index beyond one hits nothing, and an offset cut to 32
# bits does not go unnoticed.
FIRST_ADDRESS = 0x7F00_0000_0000
SPACING = 5 << 30


@dataclasses.dataclass
class Result:
    """Arrays by operand name as they are after the launch, and what it cost."""

    arrays: dict[str, np.ndarray]
    counters: Counters
    plan: dict
    program: Program


@functools.cache
def shipped(symbol: str) -> Program:
    """A kernel of the module that ships."""
    return Program(module.binary().kernel(symbol))


def plan_decode(
    operands,
    *,
    scale: float,
    use_qk_l2norm=True,
    state_layout="KV",
    kernel=None,
    lower_bound: float | None = None,
    allow_neg_eigval=False,
    layer: int = -1,
) -> dict:
    """Asks the library for a launch; operands are (address, dtype, shape) by name."""
    form = "softplus" if lower_bound is None else "sigmoid"
    if "g" in operands:
        form = "given"
        places = {gate: place for place, gate in GIVEN_GATES.items()}
        operands = {places.get(name, name): x for name, x in operands.items()}
    return _registration.cuda.plan(
        operands,
        scale,
        use_qk_l2norm,
        LAYOUTS.index(state_layout),
        kernel,
        GATE_FORMS.index(form),
        lower_bound or 0.0,
        2.0 if allow_neg_eigval else 1.0,
        layer,
    )


def planned(case: Case, kernel: str | None = None) -> str:
    """The symbol of the kernel for a call without slots, of however many sequences."""
    arrays = dataclasses.replace(case, B=1).inputs()
    arrays["out"] = arrays["v"].astype(case.out_dtype)
    operands = {}
    for number, (name, x) in enumerate(arrays.items()):
        B = x.shape[:1] if name in ("A_log", "dt_bias") else (case.B,)
        address = FIRST_ADDRESS + number * SPACING
        operands[name] = (address, str(x.dtype), [*B, *x.shape[1:]])
    layout = case.layout
    plan = plan_decode(operands, scale=1.0, state_layout=layout, kernel=kernel)
    return plan["symbol"]


def touched_slots(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which slots of the state a call reads and which it writes, as two masks."""
    B, N = len(inputs["q"]), len(inputs["state"])
    reads = np.asarray(inputs.get("state_indices", np.arange(B)))
    writes = np.asarray(inputs.get("output_state_indices", reads))
    live = (reads >= 0) & (reads < N)
    written = writes[live]
    masks = np.zeros((2, N), bool)
    masks[0, reads[live]] = True
    masks[1, written[(written >= 0) & (written < N)]] = True
    return masks[0], masks[1]


def run_plan(
    plan: dict,
    buffers: list[Buffer],
    *,
    written: Mapping[str, np.ndarray] | None = None,
    program: Program | None = None,
    approximate_by: float = 0,
    blocks: range | None = None,
) -> Result:
    """Runs a plan over buffers.

    Args:
      plan: Symbol, grid, block and arguments.
      buffers: What lies where. One may be a window into the operand it is named for.
      written: By name of a buffer, which of its rows (of the first axis) the launch
        must write whole. It must write no other row, and no other buffer.
      program: Runs this instead of the shipped kernel of that symbol.
      approximate_by: What `machine.run` takes.
      blocks: Likewise.
    """
    program = program or shipped(plan["symbol"])
    if plan["block"][1:] != (1, 1):
        raise ValueError(f"block {plan['block']}: the machine knows x alone")
    launch = Launch(plan["symbol"], plan["grid"], plan["block"][0])
    memory = GlobalMemory(launch, buffers, program.granule["global"])
    counters = machine.run(
        program,
        launch,
        memory,
        plan["arguments"],
        approximate_by,
        blocks,
    )
    if written is not None:
        for buffer in buffers:
            _check_written(launch, memory, buffer, written.get(buffer.name))
    after = {
        buffer.name: memory.contents(buffer.name)
        .view(buffer.data.dtype)
        .reshape(buffer.data.shape)
        for buffer in buffers
    }
    return Result(after, counters, plan, program)


def _check_written(
    launch: Launch, memory: GlobalMemory, buffer: Buffer, rows: np.ndarray | None
) -> None:
    """Raises unless exactly these rows of a buffer were written, each whole."""
    mask = memory.written(buffer.name)
    rows = np.zeros(1, bool) if rows is None else rows
    expected = np.repeat(rows, len(mask) // max(1, len(rows)))
    for kind, wrong in (
        (fault.UNWRITTEN, expected & ~mask),
        (fault.UNADDRESSED, mask & ~expected),
    ):
        if wrong.any():
            raise launch.fault(
                kind,
                f"{buffer.name}, {np.count_nonzero(wrong)} of {len(mask)} bytes",
                address=buffer.address + int(np.argmax(wrong)),
            )


def decode(
    inputs: dict[str, np.ndarray],
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    state_layout: str = "KV",
    out_dtype: np.dtype | None = None,
    kernel: str | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    layer: int = -1,
    edit: Callable[[str], str] | None = None,
    edit_plan: Callable[[dict], dict] = lambda plan: plan,
    approximate_by: float = 0,
    blocks: range | None = None,
) -> Result:
    """One `jax_gdn.decode` on the machine; `inputs` may hold slots.

    Slots that the call does not read hold nothing, as far as the machine knows; those
    that it does not write must stay unwritten. `kernel` is a symbol to take instead of
    the planned one. `edit` changes the kernel's PTX and `edit_plan` its launch, to
    plant defects. `blocks` are those to run, by number; all of them by default.
    """
    arrays, states = dict(inputs), inputs["state"]
    arrays["out"] = np.zeros(inputs["v"].shape, out_dtype or inputs["q"].dtype)
    if layer < 0:
        read, written = touched_slots(inputs)
    else:  # in memory a stack is one pool, of which the call touches a layer's part
        L, N = states.shape[:2]
        arrays["state"] = states.reshape(L * N, *states.shape[2:])
        masks = np.zeros((2, L, N), bool)
        masks[:, layer] = touched_slots(inputs | {"state": states[layer]})
        read, written = masks.reshape(2, L * N)
    initialised = {"out": False, "state": read}
    buffers = [
        Buffer(
            name, FIRST_ADDRESS + number * SPACING, array, initialised.get(name, True)
        )
        for number, (name, array) in enumerate(arrays.items())
    ]
    shapes = {name: list(x.shape) for name, x in arrays.items()}
    shapes["state"] = list(states.shape)
    plan = plan_decode(
        {b.name: (b.address, str(b.data.dtype), shapes[b.name]) for b in buffers},
        scale=inputs["q"].shape[-1] ** -0.5 if scale is None else scale,
        use_qk_l2norm=use_qk_l2norm,
        state_layout=state_layout,
        kernel=kernel,
        lower_bound=lower_bound,
        allow_neg_eigval=allow_neg_eigval,
        layer=layer,
    )
    program = None
    if edit is not None:
        text = edit(module.binary().entries[plan["symbol"]])
        program = Program(parse(text)[plan["symbol"]])
    whole = {"out": np.ones(len(inputs["q"]), bool), "state": written}
    result = run_plan(
        edit_plan(plan),
        buffers,
        written=whole if blocks is None else None,
        program=program,
        approximate_by=approximate_by,
        blocks=blocks,
    )
    result.arrays["state"] = result.arrays["state"].reshape(states.shape)
    return result


def run(case: Case, **options) -> Result:
    """Runs a call; `options` are those of `decode`."""
    options = {**case.settings, "out_dtype": case.out_dtype, **options}
    return decode(case.inputs() | case.slots, **options)


def planned_case(one: module.Instance, **changes) -> Case:
    """A call that the library plans a kernel for, of Qwen3-Next's heads."""
    changes = {"H": 16, "HV": 32, "T": 1 if one.single_token else 4, **changes}
    cases = (one.case(B=B, **changes) for B in (1, 3, 5, 9, 33, 129))
    return next(case for case in cases if planned(case) == one.symbol)


def fitting(case: Case) -> list[module.Instance]:
    """The kernels that may be chosen for a call."""
    found = []
    for one in module.instances():
        with contextlib.suppress(ValueError):
            planned(case, one.symbol)
            found.append(one)
    return found
