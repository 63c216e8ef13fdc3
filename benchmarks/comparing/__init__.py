"""Two result files, or two commits, side by side."""
