"""Work of each kernel by unit of a multiprocessor, counted on the machine for PTX.

cases: launches of every kernel, with the least work that their formulas need.
model: units of GPUs; the busiest one of a kernel, its floor, and the table in the documentation.
`python -m kernel_counts` (`make ptx-counts`) counts and compares with the accepted counts.
"""
