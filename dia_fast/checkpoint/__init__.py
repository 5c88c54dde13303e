"""Checkpoints on disk and on the Hub: found, read, checked, converted and written. The model itself is in `model`."""
