"""Labelled texts from any source, encoded, in batches."""
