"""Reads, downloads, draws and splits data sets, and serves them in batches."""

SPLITS = ("train", "test")
"""The parts of every data set."""
