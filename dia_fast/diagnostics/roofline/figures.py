"""Figures of the compiled kernels at the shapes of Dia-1.6B, as far as a prediction needs them.

`codegen.json` is written by `python -m bench.figures` from the reports of `bench.codegen`. Nothing in it is a time.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dia_fast.diagnostics.roofline import work
from dia_fast.model.quantization import FLOAT

FILE = "codegen.json"
DTYPES = ("bfloat16", "float16", "float32")
IN_8_BITS = " x int8"  # behind the dtype: figures of projections by weights in 8 bits


@dataclass(frozen=True)
class Figure:
    """One launch of so many rows on one target.

    block: rows of the weights per program, or tokens per program of an attention; warps: per program; resident:
    programs that one SM or CU holds at a time; in_flight: most bytes of weights that a program has on their way at
    once, 0 where the machine code does not tell; instructions: of a warp, of a projection per load of weights by the
    whole warp.
    """

    block: int
    warps: int
    resident: int
    in_flight: int
    instructions: float


@dataclass(frozen=True)
class Figures:
    """Figures of one target and dtype.

    stand_in: a sentence if they are not of the target that was asked for, or ""; in_8_bits: launches by such weights.
    """

    target: str
    dtype: str
    triton: str
    lines: dict[str, dict[int, Figure]]
    stand_in: str = ""
    in_8_bits: tuple[str, ...] = ()

    def find(self, name: str, rows: int) -> Figure:
        """The launch `name` with so many rows of x: compiled code depends on them only by the power of two above.

        Where that was not compiled, another launch of the same kind and row count stands in, if its programs are like
        this one's for the fewest rows, and failing that the next larger one of its own.
        """
        if name not in work.PROJECTIONS:
            return next(iter(self.lines[name].values()))
        wanted = self.bucket(rows)
        kin = [
            other
            for other in work.PROJECTIONS
            if (other in work.NORMED, other in self.in_8_bits) == (name in work.NORMED, name in self.in_8_bits)
        ]
        own = self.lines[name]
        for candidate in (name, *kin):
            found = self.lines[candidate]
            if wanted in found and found[min(found)].warps == own[min(own)].warps:
                return found[wanted]
        return own[min((count for count in own if count > wanted), default=max(own))]

    def bucket(self, rows: int) -> int:
        return bucket(self.target, rows)


def bucket(target: str, rows: int) -> int:
    """Rows that a projection computes for `rows` rows of x: `BLOCK_R` of `dia_kernels.triton.gemv`."""
    least = 16 if target.startswith("gfx") else 8
    return max(least, 1 << (rows - 1).bit_length())


def load(target: str, dtype: str, weights: str = FLOAT, *, first_generation: bool = False) -> Figures:
    """Figures for a target such as sm_90 and a dtype such as bfloat16, or in that dtype of the target nearest to it.

    weights: of `quantization.WEIGHTS`. first_generation: those of the code that runs Dia-1.6B of April 2025.
    """
    table, in_8_bits = _read(), work.IN_8_BITS[weights]
    found, lines = _lines(table["figures"], target, dtype)
    why = "" if found == target else f"no kernels were compiled for {target} in {dtype}; figures of {found} stand in"
    if in_8_bits:
        kind, wanted = dtype + IN_8_BITS, dtype + IN_8_BITS
        if not any(kind in kinds and _family(name) == _family(target) for name, kinds in table["figures"].items()):
            kind = "bfloat16" + IN_8_BITS
        other, narrow = _lines(table["figures"], target, kind)
        lines |= {name: narrow[name] for name in in_8_bits}
        if (other, kind) != (target, wanted):
            other += "" if kind == wanted else f" in {kind}"
            why = f"no kernels were compiled for {target} in {wanted}; figures of {other} stand in"
    for name in [name for name in lines if name.endswith(work.FIRST)]:
        donor = lines.pop(name)
        if first_generation:
            lines[name.removesuffix(work.FIRST)] = donor
    return Figures(found, dtype, table["triton"], lines, why, in_8_bits)


def _lines(table: dict[str, Any], target: str, kind: str) -> tuple[str, dict[str, dict[int, Figure]]]:
    """The target of the figures of a kind, the same or the nearest that has it, and the figures."""
    known = [name for name, kinds in table.items() if kind in kinds]
    found = target if target in known else _nearest(target, known)
    return found, {
        name: {int(rows): Figure(*values) for rows, values in rows_of.items()}
        for name, rows_of in table[found][kind].items()
    }


def _nearest(target: str, known: list[str]) -> str:
    """The newest target of the same family that is no newer, else the oldest of the family; sm_90 for strangers."""
    kin = sorted((name for name in known if _family(name) == _family(target)), key=_number)
    if not kin:
        return "sm_90"
    return next((name for name in reversed(kin) if _number(name) <= _number(target)), kin[0])


def _family(target: str) -> str:
    """NVIDIA's, CDNA with its 64-wide warps, or RDNA with 32-wide ones: none stands in for another."""
    return next((family for family in ("sm_", "gfx9", "gfx") if target.startswith(family)), "")


def _number(target: str) -> int:
    digits = target.removeprefix("sm_").removeprefix("gfx")
    return int(digits, 16) if all(letter in "0123456789abcdef" for letter in digits) and digits else 0


@functools.cache
def _read() -> dict[str, Any]:
    text = resources.files("dia_fast.diagnostics.roofline").joinpath(FILE).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
