"""Comparison of two result files, and of two commits."""
