"""The training step, the loop over it, and the machine it runs on."""
