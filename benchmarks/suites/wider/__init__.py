"""Time of the wider contrastive losses beside the plain one and the dense formulas."""
