"""The losses by Triton kernels."""
