"""Write the documentation's page of default configs from `dia_kernels/configs/*.json`.

python -m bench.configs            # writes docs/default-configs.md
python -m bench.configs --check    # exit status 1 if the page is not current
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.codegen import table
from dia_kernels import aot, launcher
from dia_kernels.triton import gemv

PAGE = Path(__file__).resolve().parent.parent / "docs" / "default-configs.md"
INTRODUCTION = """\
# Default configs of the projections

<!-- Written by `python -m bench.configs`. Edit kernels/dia_kernels/configs/*.json instead. -->

The four projections of the decode step take their block sizes from `dia_kernels/configs/*.json`. These tables are made
from the files by `python -m bench.configs`; a test checks that they are current.

The files have the format of [`DIA_KERNELS_TABLE`](kernels.md#configurations), and the first entry that fits a launch
counts. Constants that the hardware dictates are in `gemv.lanes`. `gemv_layout.py` draws the tile.

| column | meaning |
|---|---|
| op, dtype | The launch; `x int8`: by weights in 8 bits |
| shape, rows | Features by hidden size, for an entry that was chosen for one shape; rows of x |
| `BLOCK_R`, `BLOCK_N` | Rows and output features of a program. More rows than `BLOCK_R` go to further programs |
| `SPLIT_K` | Warps, which share the reduction axis |
| `CHUNKS` | 128-bit loads of a lane in a step, for each group of rows |
| `DEPTH`, `X_AHEAD` | Steps of weights and of x in flight. `X_AHEAD` 0: one, requested behind the product |
| KB | Weights of a program in flight |

`SPLIT_K` and `CHUNKS` order a sum, so they are the same for every number of rows.
"""


def _fact(wanted: Any) -> str:
    if isinstance(wanted, dict):
        low, high = wanted.get("min"), wanted.get("max")
        return f"{low} - {high}" if low and high else f"from {low}" if low else f"up to {high}"
    return ", ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)


def _lines(arch: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of every entry of one op, but for the op itself."""
    end: dict[str, int] = {}  # by everything but the rows, the last row that an entry took
    for entry in entries:
        where, use = dict(entry["where"]), entry["use"]
        last = where.pop("rows", {}).get("max", gemv.MAX_ROWS)
        first = end.get(str(where), 0) + 1
        end[str(where)] = last
        shape = " x ".join(_fact(where[name]) for name in ("features", "hidden") if name in where)
        # Of 16 bytes each; a step has as many of them in every dtype.
        loads = use["SPLIT_K"] * use["CHUNKS"] * gemv.lanes(torch.bfloat16, arch)["K_LANES"]
        in_flight = use["BLOCK_N"] * use["DEPTH"] * loads * 16 // 1024
        values = (use[name] for name in ("BLOCK_R", "BLOCK_N", "SPLIT_K", "CHUNKS", "DEPTH", "X_AHEAD"))
        kind = _fact(where["dtype"]) + (" x int8" if where.get("weight_bits") == 8 else "")
        yield kind, shape or "any", f"{first} - {last}", *map(str, values), str(in_flight)


def page() -> str:
    """Return the page: a table for each file, the ops that share all entries in one line."""
    parts = [INTRODUCTION]
    for path in sorted(launcher.CONFIGS.glob("*.json")):
        targets = [target for target in aot.TARGETS if launcher.default_table(target) == path]
        groups: dict[tuple[str, ...], list[str]] = {}
        for op, entries in launcher.read_table(str(path)).items():
            for line in _lines(path.stem, entries):
                groups.setdefault(line, []).append(op)
        head = (
            "op", "dtype", "shape", "rows", "`BLOCK_R`", "`BLOCK_N`", "`SPLIT_K`", "`CHUNKS`", "`DEPTH`", "`X_AHEAD`",
            "KB",
        )  # fmt: skip
        cells = [(", ".join(f"`{op}`" for op in ops), *line) for line, ops in groups.items()]
        others = " The interpreter takes these as well." if "sm_80" in targets else ""
        parts.append(f"## {', '.join(targets)}\n\n`{path.name}`.{others}\n\n{table(head, cells)}")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="configs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not current")
    options = parser.parse_args(arguments)
    if options.check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE.name} is {'current' if current else 'not current: run python -m bench.configs'}")
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
