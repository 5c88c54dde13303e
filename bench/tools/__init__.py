"""Instruments that look at compiled kernels: both the benchmarks and the tests use them."""
