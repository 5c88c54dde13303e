"""Tests of `dia_fast.cli`."""
