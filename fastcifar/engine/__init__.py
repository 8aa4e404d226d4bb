"""The training step, the loop over it, and what it takes of the machine."""
