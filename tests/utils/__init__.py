"""Tests of `dia_fast.utils`."""
