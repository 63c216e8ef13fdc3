"""Modules that several kernels share: the machine, compiled loops, names, variants."""
