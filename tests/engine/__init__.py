"""Tests of `dia_fast.engine`."""
