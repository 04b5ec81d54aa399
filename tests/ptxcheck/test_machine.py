"""Threads, shuffles, barriers and counters on small kernels."""

import numpy as np
import pytest

from . import fixtures, machine
from .fault import RUNAWAY, FaultError, UnsupportedError

COPY = "ld.global.u32 %r6, [%rd1]; st.global.u32 [%rd2], %r6; ret;"
LAST = "st.global.u32 [%rd2], %r6; ret;"


def test_copy_over_many_batches():
    outcome = fixtures.run(COPY, threads=1024, blocks=20)
    assert outcome.out.tolist() == list(range(1024 * 20))


def test_both_sides_of_a_branch_run_and_meet():
    outcome = fixtures.run(
        """and.b32 %r7, %r1, 1;
        setp.eq.s32 %p1, %r7, 0;
        @%p1 bra $even;
        mov.u32 %r6, 100;
        bra.uni $end;
        $even:
        mov.u32 %r6, 200;
        $end:
        add.s32 %r6, %r6, %r1;
        """
        + LAST
    )
    assert outcome.out.tolist() == [(100 if t % 2 else 200) + t for t in range(64)]
    executed = {
        i.text: n
        for i, n in zip(
            outcome.program.kernel.code, outcome.counters.executed, strict=True
        )
    }
    assert executed["mov.u32 %r6, 100"] == 2  # warps
    assert executed["add.s32 %r6, %r6, %r1"] == 2  # together again


def test_guarded_instruction_and_negation():
    outcome = fixtures.run(
        """setp.lt.u32 %p1, %r1, 5;
        mov.u32 %r6, 0;
        @%p1 mov.u32 %r6, 1;
        @!%p1 mov.u32 %r6, 2;
        """
        + LAST
    )
    assert outcome.out.tolist() == [1] * 5 + [2] * 59


def test_guarded_end():
    outcome = fixtures.run(
        """mov.u32 %r6, 1;
        st.global.u32 [%rd2], %r6;
        setp.lt.u32 %p1, %r1, 5;
        @%p1 ret;
        mov.u32 %r6, 2;
        """
        + LAST
    )
    assert outcome.out.tolist() == [1] * 5 + [2] * 59


def test_guarded_barrier_needs_all_threads():
    fixtures.run("setp.lt.u32 %p1, %r1, 64; @%p1 bar.sync 0; ret;")
    with pytest.raises(FaultError, match="32 threads missing, first 32"):
        fixtures.run("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0; ret;")


def test_loop_with_a_count_of_its_own_for_each_thread():
    outcome = fixtures.run(
        """mov.u32 %r6, 0;
        mov.u32 %r7, 0;
        $again:
        setp.gt.u32 %p1, %r7, %r1;
        @%p1 bra $end;
        add.s32 %r6, %r6, %r7;
        add.s32 %r7, %r7, 1;
        bra.uni $again;
        $end:
        """
        + LAST
    )
    assert outcome.out.tolist() == [t * (t + 1) // 2 for t in range(64)]


def test_copies_of_registers_are_apart():
    outcome = fixtures.run(
        """mov.u32 %r6, 7;
        mov.u32 %r7, %r6;
        setp.eq.s32 %p1, %r1, 3;
        @%p1 mov.u32 %r7, 8;
        """
        + LAST
    )
    assert outcome.out.tolist() == [7] * 64


def test_endless_kernel(monkeypatch):
    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    with pytest.raises(FaultError, match=RUNAWAY):
        fixtures.run("$again: bra.uni $again; ret;")


def test_shuffle_by_xor():
    outcome = fixtures.run("shfl.sync.bfly.b32 %r6|%p1, %r3, 5, 31, -1;" + LAST)
    assert outcome.out.tolist() == [t ^ 5 for t in range(64)]


def test_shuffle_within_segments():
    # Segments of 8 lanes (mask 24), of which the last that may be read is lane 6
    # (clamp 6): one whose partner lies beyond it keeps its own value.
    outcome = fixtures.run(
        f"""shfl.sync.bfly.b32 %r6|%p1, %r3, 1, {24 << 8 | 6}, -1;
        @!%p1 add.s32 %r6, %r6, 1000;
        """
        + LAST
    )
    # Lane 7 reads 6, which is in range.
    expected = [1000 + t if t % 8 == 6 else t ^ 1 for t in range(64)]
    assert outcome.out.tolist() == expected


def test_shuffle_waits_for_the_lanes_of_its_mask():
    # Odd lanes take a longer way to the same shuffle, through a loop whose head it is.
    outcome = fixtures.run(
        """mov.u32 %r8, 0;
        and.b32 %r7, %r1, 1;
        setp.eq.s32 %p1, %r7, 0;
        @!%p1 bra $odd;
        $meet:
        shfl.sync.bfly.b32 %r6|%p2, %r1, 1, 31, -1;
        bra.uni $end;
        $odd:
        add.s32 %r8, %r8, 1;
        bra.uni $meet;
        $end:
        """
        + LAST
    )
    assert outcome.out.tolist() == [(t ^ 1) for t in range(32)] + [
        t ^ 1 for t in range(32, 64)
    ]


def test_barrier_passes_values_between_warps():
    outcome = fixtures.run(
        """st.shared.u32 [%r4], %r1;
        bar.sync 0;
        mad.lo.s32 %r7, %r1, -1, 63;
        shl.b32 %r7, %r7, 2;
        mov.u32 %r8, tile;
        add.s32 %r8, %r8, %r7;
        ld.shared.u32 %r6, [%r8];
        """
        + LAST,
        blocks=3,
    )
    assert outcome.out.tolist() == list(range(63, -1, -1)) * 3
    assert outcome.counters.barriers == 3


HANDED_ON = """setp.lt.u32 %p1, %r1, 32; @%p1 bra $take;
    st.shared.u32 [%r4], %r1;
    bar.arrive 1, 64;
    ret;
    $take:
    bar.sync 1, 64;
    mov.u32 %r8, tile; add.s32 %r8, %r8, 128;
    ld.shared.u32 %r6, [%r8];
    """


def test_barrier_at_which_one_warp_arrives_and_another_waits():
    outcome = fixtures.run(HANDED_ON + LAST, blocks=3)
    assert outcome.out.reshape(3, 64)[:, :32].tolist() == [[32] * 32] * 3
    assert outcome.counters.barriers == 3


def test_what_has_arrived_touches_no_shared_memory():
    after = "bar.arrive 1, 64; st.shared.u32 [%r4], %r1;"
    with pytest.raises(UnsupportedError):
        fixtures.run(HANDED_ON.replace("bar.arrive 1, 64;", after) + LAST)


@pytest.mark.parametrize(
    "barrier",
    ["bar.sync 1;", "bar.sync 16, 64;", "bar.sync 1, 48;", "bar.sync 1, 128;"],
)
def test_barrier_of_no_such_form_is_refused(barrier):
    with pytest.raises(UnsupportedError):
        fixtures.run(HANDED_ON.replace("bar.sync 1, 64;", barrier) + LAST)


@pytest.mark.parametrize(
    ("barrier", "says"),
    [("bar.sync 1, 32;", "another number"), ("bar.sync 2, 64;", "first 32")],
)
def test_barrier_of_other_threads_does_not_pass(barrier, says):
    with pytest.raises(FaultError, match=says):
        fixtures.run(HANDED_ON.replace("bar.sync 1, 64;", barrier) + LAST)


# Two warps of four exchange words; the others do without.
IN_PART = """mov.u32 %r6, 0; setp.ge.u32 %p1, %r1, 64; @%p1 bra $rest;
    st.shared.u32 [%r4], %r1;
    bar.sync 2, 64;
    mad.lo.s32 %r7, %r1, -8, 252; add.s32 %r8, %r4, %r7;
    ld.shared.u32 %r6, [%r8];
    $rest:
    """


def test_barrier_of_a_part_of_the_block():
    outcome = fixtures.run(IN_PART + LAST, threads=128, blocks=2)
    assert outcome.out.tolist() == [*range(63, -1, -1), *[0] * 64] * 2
    with pytest.raises(FaultError, match="race"):
        fixtures.run(IN_PART.replace("bar.sync 2, 64;", "") + LAST, threads=128)


@pytest.mark.parametrize("before", [True, False])
def test_nothing_orders_the_rest_of_the_block(before):
    """What it does in shared memory is refused, up to a barrier of all."""
    touch = "@%p1 st.shared.u32 [%r4], %r1;"
    body = (
        IN_PART.replace("@%p1 bra", f"{touch} @%p1 bra") if before else IN_PART + touch
    )
    with pytest.raises(UnsupportedError):
        fixtures.run(body + LAST, threads=128)
    meet = "bar.sync 0;"
    body = body.replace(touch, touch + meet if before else meet + touch)
    fixtures.run(body + LAST, threads=128)


def test_one_block_may_pass_a_barrier_that_another_never_reaches():
    outcome = fixtures.run(
        """mov.u32 %r6, 0;
        setp.eq.s32 %p1, %r2, 0;
        @%p1 bra $end;
        bar.sync 0;
        $end:
        """
        + LAST,
        blocks=4,
    )
    assert outcome.counters.barriers == 3


def address(stride: int, register="%rd1", result="%rd4") -> str:
    """Code for `register` + stride times the thread, from the start of the buffer."""
    return f"""mad.lo.s32 %r9, %r3, -1, 0; mul.wide.s32 %rd5, %r9, 4;
        add.s64 {result}, {register}, %rd5;
        mul.wide.s32 %rd5, %r1, {stride}; add.s64 {result}, {result}, %rd5;"""


@pytest.mark.parametrize(
    ("stride", "vector", "sectors"),
    [
        (0, "", 1),
        (4, "", 4),
        (8, "", 8),
        (32, "", 32),
        (128, "", 32),
        (16, ".v4", 16),
        (32, ".v4", 32),
        (8, ".v2", 8),
    ],
)
def test_sectors_of_a_request(stride, vector, sectors):
    items = {"": "%r6", ".v2": "{%r6, %r7}", ".v4": "{%r6, %r7, %r8, %r10}"}[vector]
    outcome = fixtures.run(
        address(stride) + f"ld.global{vector}.u32 {items}, [%rd4];" + LAST,
        threads=32,
        data=np.arange(32 * 32 + 4, dtype=np.uint32),
        out_size=32,
    )
    assert outcome.counters.requested_sectors("in", is_write=False) == sectors
    assert outcome.counters.distinct_sectors("in", is_write=False) == sectors
    (traffic,) = (t for (_, b), t in outcome.counters.traffic.items() if b == "in")
    assert traffic.requests == 1
    assert traffic.bytes == 32 * traffic.width
    assert outcome.counters.requested_sectors("out", is_write=True) == 4


def test_sectors_are_distinct_for_a_block_not_for_the_launch():
    outcome = fixtures.run(
        address(0) + "ld.global.u32 %r6, [%rd4]; ld.global.u32 %r7, [%rd4];" + LAST,
        threads=64,
        blocks=3,
    )
    assert outcome.counters.requested_sectors("in", is_write=False) == 2 * 2 * 3
    assert outcome.counters.distinct_sectors("in", is_write=False) == 3


SHARED_ADDRESS = """mov.u32 %r7, tile;
    shl.b32 %r8, %r1, {shift}; and.b32 %r8, %r8, {mask}; add.s32 %r7, %r7, %r8;"""


@pytest.mark.parametrize(
    ("shift", "mask", "kind", "wavefronts", "least"),
    [
        (2, 1023, "u32", 1, 1),
        (3, 1023, "u32", 2, 1),  # two words of every second bank
        (5, 1023, "u32", 8, 1),  # eight words of each of four banks
        (2, 0, "u32", 1, 1),  # one word for all
        (2, 124, "u32", 1, 1),
        (3, 1023, "v2.u32", 2, 2),
        (4, 1023, "v4.u32", 4, 4),
        (5, 1023, "v4.u32", 8, 4),  # every second 16 bytes
        (4, 0, "v4.u32", 4, 4),
        (1, 1023, "u16", 1, 1),  # two lanes a word
    ],
)
def test_wavefronts(shift, mask, kind, wavefronts, least):
    items = {"v2": "{%r10, %r11}", "v4": "{%r10, %r11, %r12, %r13}"}
    target = items.get(kind.split(".")[0], "%rs1" if kind == "u16" else "%r10")
    fill = "".join(
        f"st.shared.v4.u32 [%r14+{at}], {{%r1, %r1, %r1, %r1}};" for at in (0, 512)
    )
    outcome = fixtures.run(
        f"""shl.b32 %r14, %r1, 4; mov.u32 %r15, tile; add.s32 %r14, %r14, %r15;
        {fill} bar.sync 0; mov.u32 %r6, 0;
        """
        + SHARED_ADDRESS.format(shift=shift, mask=mask)
        + f"ld.shared.{kind} {target}, [%r7];"
        + LAST,
        threads=32,
    )
    load = max(outcome.counters.shared)
    traffic = outcome.counters.shared[load]
    assert (traffic.wavefronts, traffic.least) == (wavefronts, least)
    assert traffic.conflicts == wavefronts - least
