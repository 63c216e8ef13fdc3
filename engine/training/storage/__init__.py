"""A run's directory: checkpoints, the best model, the locks on it."""
