"""Encoders with exits."""
