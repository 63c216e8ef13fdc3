"""Suite of the gate in loops of several processes."""
