"""Hash the machine code of every kernel, to prove that a change of the source leaves it as it was. No GPU is needed.

    python -m bench.tools.code_hashes before.json       # with the old source
    python -m bench.tools.code_hashes after.json --against before.json

Covers the launches that `bench.codegen` compiles: PTX for NVIDIA, assembly for AMD, without line information. Equal
PTX gives equal machine code: the assembler behind it sees nothing else. A hash includes the grid and the options of
the launch. The exit status is 1 if anything differs from the file given with `--against`.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from bench import codegen
from dia_fast.diagnostics import launches
from dia_kernels import aot as ahead

_DEBUG = re.compile(r"^\s*(\.loc|\.file|\.ident|\.cfi_\w+)\b")


def stripped(assembly: str, comment: str) -> str:
    """Return assembly without line information, blank lines, and what follows `comment` in a line."""
    kept = (line.split(comment)[0].rstrip() for line in assembly.splitlines() if not _DEBUG.match(line))
    return "\n".join(line for line in kept if line)


def digest(compiled: ahead.Compiled) -> str:
    """Return the hash of a launch: its code, grid, and the properties that the driver is told."""
    metadata = compiled.result.metadata
    nvidia = "ptx" in compiled.asm
    text = stripped(compiled.asm["ptx" if nvidia else "amdgcn"], "//" if nvidia else ";")
    facts = (compiled.grid, metadata.num_warps, metadata.shared, getattr(metadata, "launch_pdl", None))
    return hashlib.sha256(f"{facts}\n{text}".encode()).hexdigest()[:24]


def _without_assembler(*arguments: Any, **_: Any) -> tuple[str, str] | None:
    """End each compilation at the text of the machine code: a hook of Triton's pipeline."""
    if not arguments:
        return "code_hashes", "code_hashes"
    stages = arguments[1]
    for binary in ("cubin", "hsaco"):
        if binary in stages:
            stages[binary] = lambda source, metadata: b""
    return None


@contextmanager
def text_only() -> Iterator[None]:
    """Compile to text without line information, into a cache that is thrown away."""
    with (
        tempfile.TemporaryDirectory(prefix="dia-fast-") as cache,
        triton.knobs.cache.scope(),
        triton.knobs.runtime.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.cache.dir = cache
        triton.knobs.runtime.add_stages_inspection_hook = _without_assembler
        triton.knobs.compilation.disable_line_info = True
        yield


def hashes(targets: Sequence[str], rows: Sequence[int], dtypes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield a name and the hash of every launch: a decode step per number of rows, then prefill and codec."""
    jobs = [(dtype, target, count) for dtype in dtypes for target in targets for count in (*rows, 0)]
    for name, target, count in tqdm(jobs, unit="set", disable=not sys.stderr.isatty()):
        dtype = codegen.DTYPES[name]
        with ahead.compiling(target) as compiled:
            launches.decode(count, dtype) if count else launches.prefill(dtype)
        with ahead.compiling(target) as first:
            if count:
                launches.decode(count, dtype, model=launches.one_layer(dtype, config=codegen.FIRST_GENERATION))
        first = [item for item in first if item.kernel in codegen.FIRST_KERNELS]
        for n, item in enumerate((*compiled, *first)):
            yield f"{target} {name} rows={count} {n} {item.kernel}", digest(item)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="code_hashes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="file for the hashes (JSON)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="hashes made before")
    parser.add_argument("--targets", nargs="+", default=ahead.TARGETS, choices=ahead.TARGETS, metavar="TARGET")
    parser.add_argument("--dtypes", nargs="+", default=tuple(codegen.DTYPES), choices=codegen.DTYPES, metavar="DTYPE")
    parser.add_argument("--rows", nargs="+", type=int, default=codegen.ROWS, metavar="N")
    options = parser.parse_args(arguments)
    with text_only():
        found = dict(hashes(options.targets, options.rows, options.dtypes))
    options.out.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    print(f"{len(found)} launches, {len(set(found.values()))} different codes, Triton {triton.__version__}")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text(encoding="utf-8"))
    shared = [name for name in found if name in before]
    wrong = [f"differs: {name}" for name in shared if found[name] != before[name]]
    wrong += [f"not in {options.against}: {name}" for name in found if name not in before]
    print(*wrong, f"{len(shared)} compared, {len(wrong)} differ", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
