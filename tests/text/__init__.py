"""Tests of `dia_fast.text`."""
