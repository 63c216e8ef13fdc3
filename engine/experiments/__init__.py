"""Recipes, sweeps, and what their runs left."""
