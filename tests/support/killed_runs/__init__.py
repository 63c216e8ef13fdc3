"""Runs that are killed in the middle."""
