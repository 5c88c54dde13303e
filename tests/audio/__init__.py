"""Tests of `dia_fast.audio`."""
