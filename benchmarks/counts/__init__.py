"""Counts of operations, bytes and launches, compared with the accepted ones."""
