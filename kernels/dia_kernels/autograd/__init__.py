"""Ops that training differentiates, in Triton and by way of the torch reference."""
