"""The choice of an early-exit policy."""
