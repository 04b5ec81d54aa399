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
from tests.oracle import deferred_rows
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
PENDING = ("pending.k", "pending.u", "pending.decay")
SLOTS = ("state_indices", "output_state_indices", "fold")


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
    window: int = 0,
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
        window,
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


def flat(inputs: Mapping) -> dict[str, np.ndarray]:
    """A call's arrays by operand: those of `pending`, if there are, one by one."""
    arrays = {name: x for name, x in inputs.items() if name != "pending"}
    if "pending" in inputs:
        arrays.update(zip(PENDING, inputs["pending"], strict=True))
    return arrays


def touched_slots(inputs: Mapping) -> tuple[dict, dict]:
    """Which slots of the state a call reads and which it writes, as two masks."""
    B, N = len(inputs["q"]), len(inputs["state"])
    reads = np.asarray(inputs.get("state_indices", np.arange(B)))
    writes = np.asarray(inputs.get("output_state_indices", reads))
    live = (reads >= 0) & (reads < N)
    written = writes[live]
    masks = np.zeros((2, N), bool)
    masks[0, reads[live]] = True
    masks[1, written[(written >= 0) & (written < N)]] = True
    return {"state": masks[0]}, {"state": masks[1]}


def touched_entries(inputs: Mapping, window: int) -> tuple[dict, dict]:
    """The same of a deferred call, and which entries of the rings."""
    rings = dict(zip(PENDING, inputs["pending"], strict=True))
    slots = {name: inputs[name] for name in SLOTS if name in inputs}
    R, T = inputs["pending"][0].shape[2], inputs["q"].shape[1]
    # A row whose cursors turn out to be bad has begun to read its state.
    read = touched_slots(inputs)[0]
    written = {"state": np.zeros_like(read["state"])}
    for masks in (read, written):
        masks |= {name: np.zeros(x.shape[:3], bool) for name, x in rings.items()}
    for row in deferred_rows(inputs["cursors"], R, window, T, **slots):
        for name in PENDING:
            read[name][row.read][:, list(row.pending)] = True
            if row.write is not None:
                written[name][row.write][:, list(row.appended)] = True
        if row.folds:
            written["state"][row.write] = True
    return read | {"cursors": read["state"]}, written


def of_layer(inputs: Mapping, layer: int) -> dict:
    """The arrays of a call of one layer of stacks."""
    own = dict(inputs) | {"state": inputs["state"][layer]}
    if "pending" in inputs:
        own["pending"] = [x[layer] for x in inputs["pending"]]
    return own


def in_layer(inputs: Mapping, masks: Mapping, layer: int) -> dict[str, np.ndarray]:
    """Masks of a layer's slots as those of a stack."""
    L, stacked = len(inputs["state"]), ("state", *PENDING)
    found = dict(masks)
    for name in stacked:
        if name in masks:
            found[name] = np.zeros((L, *masks[name].shape), bool)
            found[name][layer] = masks[name]
    return found


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
      written: By name of a buffer, which of its parts (a mask of the first axes) the
        launch must write whole. It must write no other part, and no other buffer.
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
    launch: Launch, memory: GlobalMemory, buffer: Buffer, parts: np.ndarray | None
) -> None:
    """Raises unless exactly these parts of a buffer were written, each whole."""
    mask = memory.written(buffer.name)
    parts = np.zeros(1, bool) if parts is None else parts.ravel()
    expected = np.repeat(parts, len(mask) // max(1, len(parts)))
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
    inputs: Mapping,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    state_layout: str = "KV",
    out_dtype: np.dtype | None = None,
    kernel: str | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    layer: int = -1,
    window: int = 0,
    edit: Callable[[str], str] | None = None,
    edit_plan: Callable[[dict], dict] = lambda plan: plan,
    approximate_by: float = 0,
    blocks: range | None = None,
) -> Result:
    """One `jax_gdn.decode` on the machine; `inputs` may hold slots.

    With a window it is a `decode_deferred`, of which `inputs` hold `pending` and
    `cursors`, and maybe `fold`. Slots and entries that the call does not read hold
    nothing, as far as the machine knows; those that it does not write must stay
    unwritten. `kernel` is a symbol to take instead of
    the planned one. `edit` changes the kernel's PTX and `edit_plan` its launch, to
    plant defects. `blocks` are those to run, by number; all of them by default.
    """
    arrays = flat(inputs)
    arrays["out"] = np.zeros(inputs["v"].shape, out_dtype or inputs["q"].dtype)
    own = inputs if layer < 0 else of_layer(inputs, layer)
    read, written = touched_entries(own, window) if window else touched_slots(own)
    if layer >= 0:
        read, written = (in_layer(inputs, masks, layer) for masks in (read, written))
    initialised = {"out": False, **read}
    buffers = [
        Buffer(
            name, FIRST_ADDRESS + number * SPACING, array, initialised.get(name, True)
        )
        for number, (name, array) in enumerate(arrays.items())
    ]
    plan = plan_decode(
        {b.name: (b.address, str(b.data.dtype), list(b.data.shape)) for b in buffers},
        scale=inputs["q"].shape[-1] ** -0.5 if scale is None else scale,
        use_qk_l2norm=use_qk_l2norm,
        state_layout=state_layout,
        kernel=kernel,
        lower_bound=lower_bound,
        allow_neg_eigval=allow_neg_eigval,
        layer=layer,
        window=window,
    )
    program = None
    if edit is not None:
        text = edit(module.binary().entries[plan["symbol"]])
        program = Program(parse(text)[plan["symbol"]])
    whole = {"out": np.ones(1, bool), **written}
    return run_plan(
        edit_plan(plan),
        buffers,
        written=whole if blocks is None else None,
        program=program,
        approximate_by=approximate_by,
        blocks=blocks,
    )


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
