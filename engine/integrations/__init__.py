"""ACL in other people's loops: transformers' Trainer, sentence-transformers, metric learning."""
