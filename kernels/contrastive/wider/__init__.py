"""The contrastive losses with tensors as temperatures, several labels a row, and memories."""
