"""Shortcuts of a forward pass in training."""
