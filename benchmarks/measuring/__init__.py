"""Time, memory and operation counts, and the file that holds them."""
