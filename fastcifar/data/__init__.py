"""Where images come from: reading, fetching, drawing and splitting data sets, and serving them in batches."""

SPLITS = ("train", "test")
"""The parts of every data set."""
