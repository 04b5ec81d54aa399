"""Defects planted in small kernels: each detector must speak, and say where."""

import numpy as np
import pytest

from . import fault, fixtures
from .fault import FaultError
from .program import PREFETCH

LAST = "st.global.u32 [%rd2], %r6; ret;"


def caught(kind: str, body: str, **arguments) -> FaultError:
    """Runs a small kernel that must be stopped for one reason."""
    with pytest.raises(FaultError) as caught:
        fixtures.run(body, **arguments)
    assert caught.value.kind == kind, caught.value
    return caught.value


def test_load_one_past_the_end():
    found = caught(fault.OUT_OF_BOUNDS, "ld.global.u32 %r6, [%rd1+4];" + LAST, blocks=2)
    assert found.block == (1, 0, 0)
    assert found.thread == 63
    assert found.address == fixtures.IN + 4 * 128
    assert found.instruction == "ld.global.u32 %r6, [%rd1+4]"
    assert "0 bytes behind the end of in" in str(found)


def test_store_before_the_start():
    found = caught(fault.OUT_OF_BOUNDS, "st.global.u32 [%rd2+-4], %r1; ret;")
    assert (found.thread, found.address) == (0, fixtures.OUT - 4)


def test_wide_load_across_the_end():
    found = caught(
        fault.OUT_OF_BOUNDS,
        """setp.ne.s32 %p1, %r1, 60; @%p1 bra $end;
        ld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%rd1]; $end: ret;""",
        data=np.zeros(63, np.uint32),
        out_size=64,
    )
    assert found.thread == 60


def test_address_cut_to_32_bits():
    caught(
        fault.OUT_OF_BOUNDS,
        "cvt.u32.u64 %r6, %rd1; cvt.u64.u32 %rd4, %r6; ld.global.u32 %r6, [%rd4];"
        + LAST,
    )


def test_prefetch_across_the_end():
    first = f"setp.ne.s32 %p1, %r1, 0; @!%p1 {PREFETCH} [%rd1], 32; ret;"
    enough = fixtures.run(first, data=np.zeros(8, np.uint32))
    assert enough.counters.prefetched == [(fixtures.IN, 32)]
    found = caught(fault.OUT_OF_BOUNDS, first, data=np.zeros(7, np.uint32))
    assert (found.thread, found.address) == (0, fixtures.IN)


@pytest.mark.parametrize("piece", ["[%rd1+4], 16", "[%rd1], 8"])
def test_prefetch_of_what_is_no_piece(piece):
    first = f"setp.ne.s32 %p1, %r1, 0; @!%p1 {PREFETCH} {piece}; ret;"
    assert caught(fault.MISALIGNED, first).thread == 0


def test_misaligned_global_access():
    body = "ld.global.v2.u32 {%r6, %r7}, [%rd1];" + LAST
    found = caught(fault.MISALIGNED, body, data=np.zeros(66, np.uint32), out_size=64)
    assert (found.thread, found.address) == (1, fixtures.IN + 4)


def test_parameters_end():
    found = caught(fault.OUT_OF_BOUNDS, "ld.param.u64 %rd4, [kernel_out+8];" + LAST)
    assert "parameters" in str(found)


def test_shared_out_of_bounds():
    found = caught(fault.OUT_OF_BOUNDS, "st.shared.u32 [%r4+772], %r1; ret;")
    assert found.thread == 63


def test_shared_address_without_its_base():
    caught(fault.OUT_OF_BOUNDS, "st.shared.u32 [%r5], %r1; ret;")


def test_misaligned_shared_access():
    found = caught(fault.MISALIGNED, "st.shared.v4.u32 [%r4], {%r1,%r1,%r1,%r1}; ret;")
    assert found.thread == 1


def test_shared_memory_that_nothing_wrote():
    found = caught(
        fault.UNINITIALISED,
        """setp.eq.s32 %p1, %r1, 40; @%p1 bra $skip;
        st.shared.u32 [%r4], %r1;
        $skip: bar.sync 0; ld.shared.u32 %r6, [%r4];"""
        + LAST,
    )
    assert found.thread == 40


def test_half_of_what_is_read_was_written():
    caught(
        fault.UNINITIALISED,
        "cvt.u16.u32 %rs1, %r1; st.shared.u16 [%r4], %rs1; ld.shared.u32 %r6, [%r4];"
        + LAST,
    )


def test_global_memory_that_nothing_wrote():
    found = caught(fault.UNINITIALISED, "ld.global.u32 %r6, [%rd2];" + LAST)
    assert "buffer out" in str(found)


def test_register_that_nothing_wrote():
    caught(fault.REGISTER, LAST)


def exchange(between: str, other: int) -> str:
    """Each thread writes its word and, after `between`, reads its partner's."""
    # (t | o) - (t & o), the machine having no xor.
    return (
        f"""st.shared.u32 [%r4], %r1;
        {between}
        or.b32 %r7, %r1, {other}; and.b32 %r8, %r1, {other};
        mad.lo.s32 %r7, %r8, -1, %r7; shl.b32 %r7, %r7, 2;
        mov.u32 %r8, tile; add.s32 %r8, %r8, %r7;
        ld.shared.u32 %r6, [%r8];"""
        + LAST
    )


@pytest.mark.parametrize("other", [1, 32])
def test_write_then_read_without_a_barrier(other):
    found = caught(fault.SHARED_RACE, exchange("", other))
    assert (found.thread, found.block) == (0, (0, 0, 0))
    assert f"thread {other} was there" in str(found)


def test_barrier_orders_them():
    outcome = fixtures.run(exchange("bar.sync 0;", 33))
    assert outcome.out.tolist() == [t ^ 33 for t in range(64)]


def test_warp_barrier_orders_a_warp():
    outcome = fixtures.run(exchange("bar.warp.sync -1;", 1))
    assert outcome.out.tolist() == [t ^ 1 for t in range(64)]


def test_warp_barrier_does_not_order_two_warps():
    found = caught(fault.SHARED_RACE, exchange("bar.warp.sync -1;", 32))
    assert "warp 1 was there" in str(found)


def test_shuffle_is_no_warp_barrier():
    caught(fault.SHARED_RACE, exchange("shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", 1))


@pytest.mark.parametrize("writer", [0, 1, 63])
def test_read_then_write_without_a_barrier(writer):
    found = caught(
        fault.SHARED_RACE,
        f"""st.shared.u32 [%r4], %r1; bar.sync 0;
        mov.u32 %r8, tile; ld.shared.u32 %r6, [%r8+4];
        setp.eq.s32 %p1, %r1, {writer}; @!%p1 bra $end;
        st.shared.u32 [%r8+4], %r6;
        $end:"""
        + LAST,
    )
    assert found.thread == writer
    assert "st.shared" in found.instruction


def test_barrier_orders_reads_before_a_write():
    outcome = fixtures.run(
        """st.shared.u32 [%r4], %r1; bar.sync 0;
        mov.u32 %r8, tile; ld.shared.u32 %r6, [%r8+4]; bar.sync 0;
        setp.eq.s32 %p1, %r1, 9; @!%p1 bra $end;
        st.shared.u32 [%r8+4], %r1;
        $end:"""
        + LAST,
    )
    assert outcome.out.tolist() == [1] * 64


def test_readers_of_two_warps_are_remembered():
    # Warp 0 met in a barrier of its own after reading; warp 1, which read too, did not.
    found = caught(
        fault.SHARED_RACE,
        """st.shared.u32 [%r4], %r1; bar.sync 0;
        mov.u32 %r8, tile; ld.shared.u32 %r6, [%r8];
        bar.warp.sync -1;
        setp.eq.s32 %p1, %r1, 5; @!%p1 bra $end;
        st.shared.u32 [%r8], %r6;
        $end:"""
        + LAST,
    )
    assert found.thread == 5


def test_reader_of_the_same_warp_after_its_barrier_is_ordered():
    fixtures.run(
        """st.shared.u32 [%r4], %r1; bar.sync 0;
        setp.gt.u32 %p1, %r1, 31; mov.u32 %r6, 0; @%p1 bra $end;
        mov.u32 %r8, tile; ld.shared.u32 %r6, [%r8];
        bar.warp.sync -1;
        setp.eq.s32 %p2, %r1, 5; @!%p2 bra $end;
        st.shared.u32 [%r8], %r6;
        $end:"""
        + LAST
    )


def test_two_threads_write_in_one_instruction():
    found = caught(
        fault.SHARED_RACE, "and.b32 %r4, %r4, -8; st.shared.u32 [%r4], %r1; ret;"
    )
    assert found.thread == 0


def missed_barrier(below: str) -> fault.FaultError:
    """Of two blocks, in which threads meet only where the first operand is below."""
    code = f"setp.lt.u32 %p1, {below}; mov.u32 %r6, 0; @!%p1 bra $end;"
    return caught(fault.BARRIER, code + "bar.sync 0; $end:" + LAST, blocks=2)


def test_barrier_that_half_a_block_never_reaches():
    found = missed_barrier("%r1, 32")
    assert (found.thread, found.block) == (0, (0, 0, 0))
    assert "32 threads missing, first 32" in str(found)
    assert found.instruction == "bar.sync 0"


def test_barrier_that_one_block_passes_and_another_does_not():
    assert missed_barrier("%r3, 96").block == (1, 0, 0)


def test_barrier_at_which_a_warp_did_not_arrive():
    found = caught(
        fault.BARRIER,
        """setp.lt.u32 %p1, %r1, 32; mov.u32 %r6, 0; @!%p1 bra $end;
        bar.sync 1, 64;
        $end:"""
        + LAST,
    )
    assert "32 threads missing, first 32" in str(found)


def test_two_barriers_in_two_branches():
    caught(
        fault.BARRIER,
        """setp.lt.u32 %p1, %r1, 32; mov.u32 %r6, 0; @!%p1 bra $other;
        bar.sync 0; bra.uni $end;
        $other: bar.sync 0;
        $end:"""
        + LAST,
    )


def test_shuffle_that_half_a_warp_never_reaches():
    found = caught(
        fault.WARP_SYNC,
        """mov.u32 %r6, 0; setp.lt.u32 %p1, %r1, 16; @!%p1 bra $end;
        shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;
        $end:"""
        + LAST,
    )
    assert found.instruction.startswith("shfl")


def test_shuffle_by_a_lane_outside_its_mask():
    caught(fault.WARP_SYNC, "shfl.sync.bfly.b32 %r6, %r1, 1, 31, 65535;" + LAST)


def test_shuffle_from_a_lane_that_takes_no_part():
    caught(
        fault.WARP_SYNC,
        """mov.u32 %r6, 0; setp.lt.u32 %p1, %r1, 16; @!%p1 bra $end;
        shfl.sync.bfly.b32 %r6, %r1, 16, 31, 65535;
        $end:"""
        + LAST,
    )


@pytest.mark.parametrize("blocks", [2, 300])  # 300 blocks run in several batches
def test_two_blocks_write_one_location(blocks):
    found = caught(
        fault.BLOCK_CONFLICT,
        "mad.lo.s32 %r7, %r3, -1, %r1;"
        "mul.wide.s32 %rd4, %r7, 4; add.s64 %rd2, %rd2, %rd4;"
        "mov.u32 %r6, 1;" + LAST,
        blocks=blocks,
    )
    assert "thread 0 of block" in str(found)


def test_one_block_reads_what_another_wrote():
    found = caught(
        fault.BLOCK_CONFLICT,
        """setp.eq.s32 %p1, %r2, 0; @!%p1 bra $other;
        st.global.u32 [%rd1+256], %r1;
        ret;
        $other: ld.global.u32 %r6, [%rd1]; ret;""",
        blocks=2,
    )
    assert (found.block, found.thread) == ((1, 0, 0), 0)


def test_one_block_writes_what_another_read():
    caught(
        fault.BLOCK_CONFLICT,
        """setp.eq.s32 %p1, %r2, 0; @!%p1 bra $other;
        ld.global.u32 %r6, [%rd1+256]; ret;
        $other: st.global.u32 [%rd1], %r1; ret;""",
        blocks=2,
    )


def test_two_threads_of_a_block_write_one_location():
    caught(
        fault.THREAD_CONFLICT,
        "cvt.u64.u32 %rd4, %r5; mad.lo.s32 %r7, %r1, -1, 0; mul.wide.s32 %rd4, %r7, 4;"
        "add.s64 %rd2, %rd2, %rd4; mov.u32 %r6, 1;" + LAST,
    )


def test_block_size():
    caught(fault.BLOCK_SIZE, "ret;", threads=2048)
