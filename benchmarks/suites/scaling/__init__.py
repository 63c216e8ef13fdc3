"""Suite of negatives from all ranks: bytes, memory and time."""
