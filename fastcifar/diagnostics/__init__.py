"""Reports on a network or a machine before training."""
