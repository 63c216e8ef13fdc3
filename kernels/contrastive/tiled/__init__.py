"""The losses by PyTorch tiles, and by a compiled loop for small CPU batches."""
