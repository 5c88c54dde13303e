"""Batches from a file of texts to a folder of sounds, with a manifest to resume from."""
