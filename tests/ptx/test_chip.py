"""The chip beside the machine that stands for it: the same bits, on a GPU."""

import dataclasses
import functools as ft
import itertools

import jax
import numpy as np
import pytest
from cases import LAYOUTS, Case

import jax_gdn
from ptx import launch

pytestmark = pytest.mark.usefixtures("built")
# Gates of 1, and no norms: of .approx instructions PTX says how far they may be off,
# not what they answer, so where those matter the chip's bits are its own.
EXACT = Case(x=-1e4, b_value=100.0, use_qk_l2norm=False, qk_norm=1.0)
CASES = [
    *(
        dataclasses.replace(EXACT, layout=layout, state=state, T=T, B=B)
        for layout, state, T, B in itertools.product(
            LAYOUTS, ("float32", "bfloat16", "float16"), (1, 3), (2, 65)
        )
        # Of large tiles, one is enough, and half a state a block.
        if B == 2 or (T == 1 and state != "float16")
    ),
    # Of others, what only these numbers of states take.
    *(dataclasses.replace(EXACT, B=B) for B in (17, 33)),
    *(dataclasses.replace(EXACT, state="bfloat16", B=B) for B in (33, 1025)),
    dataclasses.replace(EXACT, B=257, layout="VK"),
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits(case, gpu):
    arrays = jax.device_put(case.inputs() | case.slots, gpu)
    call = ft.partial(jax_gdn.decode, **case.settings, implementation="native")
    chip = dict(zip(("out", "state"), jax.jit(call)(**arrays), strict=True))
    options = {**case.settings, "out_dtype": case.out_dtype}
    machine = launch.decode(case.inputs() | case.slots, **options)
    for name, array in chip.items():
        expected = machine.arrays[name]
        if name == "state" and case.writes is not None:
            written = np.array(case.writes)[np.array(case.reads) >= 0]
            array, expected = array[written], expected[written]
        assert np.asarray(array).tobytes() == np.asarray(expected).tobytes(), name
