"""Suite of several exits: training them together, and early exit."""
