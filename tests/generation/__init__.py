"""Tests of `dia_fast.generation`, and of what holds at every door."""
