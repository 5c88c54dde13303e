"""Tests of `dia_fast.jobs`."""
