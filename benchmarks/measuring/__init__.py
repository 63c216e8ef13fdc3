"""Time, memory and operation counts, and the file they are kept in."""
