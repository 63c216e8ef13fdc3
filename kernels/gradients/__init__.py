"""Dot product and norms of two lists of gradients, and their gated combination."""
