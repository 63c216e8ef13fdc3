"""A machine for PTX: runs what Triton compiles for a GPU on the CPU, and checks every access.

program: PTX text -> basic blocks of instructions.
translation: instructions -> functions of all threads at once (operations, warps, sm_80).
machine: the threads of a launch, their control flow and barriers.
memory: bounds, alignment, races and uninitialised reads of each access.
counts: what a launch asks of the units of a multiprocessor.
driver: Triton's driver, whose launches run here.
pytest_plugin: the kernels' tests on this machine.
"""
