"""Analyses of a trained model: gradient angles, representations."""
