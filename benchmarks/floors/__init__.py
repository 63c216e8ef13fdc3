"""Lower bounds of the time that a machine needs."""
