"""Triton's interpreter, repaired for tests: it computes what a GPU would, and refuses what a GPU would not forgive.

What Triton's own interpreter gets wrong or lets pass, and where it is put right:

- `formats.py`: bf16 (arithmetic on raw bits, truncation) and fp8 numbers, fp16 overflow, float to int;
- `builder.py`: every operation in those formats, NaN rules of min and max, tf32 and smallest shapes of `tl.dot`,
  overflowing integers, device asserts;
- `reductions.py`: reductions and scans as trees that round at every step, in any dtype, with any combine function;
- `memory.py`: every active pointer is checked against the argument it came from, lanes that a mask switched off hold
  poison, lanes of one store must not disagree, floating-point atomics are refused;
- `schedule.py`: programs run in a shuffled order, or interleaved at their memory accesses;
- `executor.py`: launches: arguments as compiled kernels see them, unknown options refused, errors with their place.

It builds on private classes of Triton 3.6 to 3.9; `install` is all that a test session needs.
"""

from bench.tools.interpreter.defects import (
    Disagreement,
    FailedAssert,
    KernelDefect,
    OutOfBounds,
    Overflow,
    Unsupported,
)
from bench.tools.interpreter.install import install
from bench.tools.interpreter.schedule import ORDERS, program_order
from bench.tools.interpreter.state import Access, listening

__all__ = [
    "ORDERS",
    "Access",
    "Disagreement",
    "FailedAssert",
    "KernelDefect",
    "OutOfBounds",
    "Overflow",
    "Unsupported",
    "install",
    "listening",
    "program_order",
]
