"""Lower bounds of the time that the work takes on a machine."""
