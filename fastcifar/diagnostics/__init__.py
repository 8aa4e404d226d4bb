"""What can be told about a network or a machine before training."""
