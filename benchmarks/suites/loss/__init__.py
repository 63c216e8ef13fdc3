"""Suite of the contrastive losses."""
