"""Tests of `dia_fast.checkpoint`."""
