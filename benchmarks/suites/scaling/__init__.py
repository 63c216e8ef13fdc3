"""Negatives of all ranks: bytes, memory and time."""
