"""What several kernels need: the machine, compiled loops, names, variants."""
