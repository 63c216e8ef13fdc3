"""Suite of the angle check and the gated combination."""
