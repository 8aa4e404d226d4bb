"""Reads, downloads, draws and splits data sets, and serves them in batches."""

SPLITS = ("train", "test")
"""The parts of every data set."""

IMAGE_SIZES = range(4, 1025)
"""Pixels a side of the images that can be trained on."""
