"""What a forward pass in training does otherwise than the encoder asks for, to take less time."""
