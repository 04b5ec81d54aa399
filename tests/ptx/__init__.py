"""A PTX machine: runs the kernels that ship, instruction by instruction, without a GPU.

    module    takes PTX, SASS and resource usage out of the built `_cuda`
    parser    PTX text -> kernels
    floats    float32 as PTX defines it
    opcodes   what each arithmetic instruction computes
    memory    global buffers at fake addresses, shared memory, and their detectors
    counters  sectors, wavefronts, instructions
    machine   executes a grid, vectorised over threads
    launch    the library's own launch plan, run over NumPy arrays
    sass      what ptxas made of it
    report    one line a kernel instance

What it cannot see: time, the scheduler, the memory model between blocks and across
launches, and ptxas itself. It takes blocks in one order out of many, but what it
reports does not depend on the order: an access is judged by what any order allows.
"""
