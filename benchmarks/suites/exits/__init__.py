"""Exits trained together, and early exit."""
