"""Dot product and norms of two gradients in one pass, and the gated combination."""
