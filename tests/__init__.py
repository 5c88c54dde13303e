"""Tests of `dia_kernels` (kernels/) and `dia_fast`; parity/ holds the comparisons with other implementations."""
