"""Sets of texts that tests train on."""
