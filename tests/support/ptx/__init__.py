"""A machine for PTX: runs on the CPU what Triton compiles for a GPU, and checks every access.

program: PTX text -> basic blocks of instructions.
translation: instructions -> functions of all threads at once (operations, warps, sm_80).
machine: the threads of a launch, their control flow and barriers.
memory: bounds, alignment, races and uninitialised reads of each access.
counts: the work of a launch, by unit of a multiprocessor.
driver: Triton's driver, whose launches run here.
kernels: the project's kernels with that driver; kernel_counts counts their work.
snippets: a few instructions as a kernel, for the machine's own tests.
pytest_plugin: the kernels' tests on this machine.
"""
