"""Kernels for Dia's decode step and prefill: every op in plain torch (`reference`) and in Triton (`kernels`).

Needs torch, and Triton for the Triton op set only. `get_ops` picks one of the two for a device; `with_ops`
replaces some of its ops.
"""

from dia_kernels.ops import get_ops, with_ops

__all__ = ["get_ops", "with_ops"]
