"""The contrastive losses beside their peers."""
