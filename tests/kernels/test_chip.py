"""The chip beside the machine that stands for it: the same bits, on a GPU."""

import dataclasses
import functools as ft
import itertools

import jax
import numpy as np
import pytest

import jax_gdn
from tests.cases import LAYOUTS, Case
from tests.kernels import launch, module

pytestmark = pytest.mark.usefixtures("built")
# Gates of 1, and no norms: of .approx instructions PTX says how far they may be off,
# not what they answer, so where those matter the chip's bits are its own.
VALUES = {"x": -1e4, "b_value": 100.0, "use_qk_l2norm": False, "qk_norm": 1.0}
EXACT = Case(**VALUES)
CASES = [
    *(
        dataclasses.replace(EXACT, layout=layout, state=state, T=5, B=33, V=64)
        for layout, state in itertools.product(LAYOUTS, ("float32", "bfloat16"))
    ),
    *(
        dataclasses.replace(EXACT, layout=layout, K=K, V=48, T=2, q="float32")
        for layout, K in itertools.product(LAYOUTS, (64, 192, 256))
    ),
    *(
        dataclasses.replace(EXACT, layout=layout, N=9, reads=(7, -1), writes=(2, 3))
        for layout in LAYOUTS
    ),
    *(
        dataclasses.replace(EXACT, layout=layout, per_channel=True)
        for layout in LAYOUTS
    ),
]


def check(case: Case, gpu) -> None:
    arrays = jax.device_put(case.inputs() | case.slots, gpu)
    call = ft.partial(jax_gdn.decode, **case.settings, implementation="native")
    chip = dict(zip(("out", "state"), jax.jit(call)(**arrays), strict=True))
    machine = launch.run(case)
    for name, array in chip.items():
        expected = machine.arrays[name]
        if name == "state" and case.writes is not None:
            written = np.array(case.writes)[np.array(case.reads) >= 0]
            array, expected = array[written], expected[written]
        assert np.asarray(array).tobytes() == np.asarray(expected).tobytes(), name


@pytest.mark.parametrize("one", module.plain(), ids=lambda one: one.symbol)
def test_bits_of_every_kernel(one, gpu):
    check(launch.planned_case(one, **VALUES), gpu)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits(case, gpu):
    check(case, gpu)
