"""Dia-1.6B text to speech: official weights in, audio out."""
