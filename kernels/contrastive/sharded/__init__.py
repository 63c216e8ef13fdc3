"""The losses over the batches of all ranks of a process group."""
