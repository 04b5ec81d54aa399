"""Small kernels for tests of the machine itself."""

import dataclasses

import numpy as np

from . import machine
from .counters import Counters
from .lanes import Launch
from .memory import Buffer, GlobalMemory
from .parser import parse
from .program import Program

IN, OUT = 0x7F00_0000_0000, 0x7F10_0000_0000

# Every kernel takes two pointers, in %rd1 (buffer "in") and %rd2 ("out"), and finds
# its thread in %r1, its block in %r2, its place in the grid in %r3 and, times 4, in
# %rd3. It may use 1 KiB of shared memory at `tile`, whose address for the thread is
# in %r4.
FRAME = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry kernel(
.param .u64 kernel_in,
.param .u64 kernel_out
)
.maxntid 1024, 1, 1
{{
.reg .pred %p<8>;
.reg .b16 %rs<8>;
.reg .b32 %r<32>;
.reg .f32 %f<32>;
.reg .b64 %rd<32>;
.shared .align 16 .b8 tile[1024];
ld.param.u64 %rd1, [kernel_in];
ld.param.u64 %rd2, [kernel_out];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
shl.b32 %r3, %r2, {log2_threads};
add.s32 %r3, %r3, %r1;
cvt.u64.u32 %rd3, %r3;
shl.b64 %rd3, %rd3, 2;
add.s64 %rd1, %rd1, %rd3;
add.s64 %rd2, %rd2, %rd3;
mov.u32 %r4, tile;
shl.b32 %r5, %r1, 2;
add.s32 %r4, %r4, %r5;
{body}
}}
"""


@dataclasses.dataclass
class Outcome:
    """What "out" holds, and what it cost."""

    out: np.ndarray
    counters: Counters
    program: Program


def run(body: str, *, threads=64, blocks=1, data=None, out_size=None) -> Outcome:
    """Runs a body over `data` (by default 0, 1, 2, ... as uint32)."""
    text = FRAME.format(body=body, log2_threads=threads.bit_length() - 1)
    count = threads * blocks
    if data is None:
        data = np.arange(count, dtype=np.uint32)
    out = np.zeros(count if out_size is None else out_size, data.dtype)
    program = Program(parse(text)["kernel"])
    launch = Launch("kernel", (blocks, 1, 1), threads)
    buffers = [Buffer("in", IN, data), Buffer("out", OUT, out, is_initialised=False)]
    memory = GlobalMemory(launch, buffers, program.granule["global"])
    arguments = np.array([IN, OUT], np.uint64).tobytes()
    counters = machine.run(program, launch, memory, arguments)
    return Outcome(memory.contents("out").view(data.dtype), counters, program)
