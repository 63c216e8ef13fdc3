"""Backward passes and optimizer steps: local, or by DeepSpeed."""
