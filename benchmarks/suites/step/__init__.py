"""Suite of whole training steps."""
