"""Tests of `dia_fast.diagnostics`."""
