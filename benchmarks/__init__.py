"""Time and memory of the losses, the gate and training steps, beside the alternatives."""
