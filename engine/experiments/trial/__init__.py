"""`fusedacl try`: whether the contrastive term pays on a user's own data."""
