"""Runs a kernel's PTX on the CPU and judges its memory accesses.

    binary    PTX, SASS and resource usage of a compiled file
    parser    PTX text -> kernels
    floats    float32 as PTX defines it
    opcodes   what each arithmetic instruction computes
    program   a kernel made ready to run
    lanes     which threads execute an instruction
    memory    global buffers at fake addresses, shared memory, and their detectors
    counters  sectors, wavefronts, instructions
    machine   executes a grid, vectorised over threads
    fault     what is detected
    sass      questions to the machine code

README.md has an example.
"""
