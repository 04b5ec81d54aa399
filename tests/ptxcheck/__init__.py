"""Runs a kernel's PTX on the CPU and judges its memory accesses.

    binary    PTX, SASS and resource usage of a compiled file
    parser    PTX text -> kernels
    floats    float32 as PTX defines it
    opcodes   what each arithmetic instruction computes
    matrices  what tensor cores compute
    program   a kernel made ready to run
    lanes     which threads execute an instruction
    memory    global buffers at fake addresses, shared memory, and their detectors
    counters  sectors, wavefronts, instructions
    machine   executes a grid, vectorised over threads
    warps     what the lanes of a warp do together
    fault     what is detected
    sass      questions to the machine code

README.md has an example.
"""
