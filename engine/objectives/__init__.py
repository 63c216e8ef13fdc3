"""Losses of the exits, large contrastive batches, and the gate."""
