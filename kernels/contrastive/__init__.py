"""Supervised contrastive losses without the matrix of pairs."""
