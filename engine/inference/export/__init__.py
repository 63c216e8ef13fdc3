"""Early exit on other runtimes than PyTorch."""
