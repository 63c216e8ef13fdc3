"""What the loss, the angle check and a training step cost, beside what one would use instead."""
