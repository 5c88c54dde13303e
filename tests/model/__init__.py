"""Tests of `dia_fast.model`."""
