"""Kernels for Dia's decode step and prefill: every op in plain torch (`reference`) and in Triton (`kernels`).

Needs torch, and Triton for the Triton op set only. `get_ops` picks one of the two for a device.
"""

from dia_kernels.ops import get_ops

__all__ = ["get_ops"]
