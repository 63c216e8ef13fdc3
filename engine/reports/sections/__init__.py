"""Sections of a sweep's report."""
