"""The angle check and the gate beside their peers."""
