"""Files that every benchmark writes in the same way: JSON of one schema, and CSV.

A benchmark calls `add_options` on its parser and makes a `Results` when it begins to measure. Each `add` writes the
files anew, so that what was found is there if the run is broken off. `python -m bench.compare A B` compares two files.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bench.environment import collect
from bench.measure import describe_machine
from bench.parts import scrub
from dia_fast.errors import InputError
from dia_fast.utils.files import replacing
from dia_kernels import launcher

SCHEMA = 1
Scalar: TypeAlias = str | int | float | bool | None
Values: TypeAlias = Mapping[str, Scalar]

# Of a file: what each entry must be. docs/benchmarks.md describes them.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "bench": str,
    "argv": list,
    "started": str,
    "commit": str,
    "dirty": bool,
    "versions": dict,
    "device": str,
    "processor": str,
    "facts": dict,
    "table": dict,
    "status": (int, type(None)),
    "results": list,
}
VERSIONS = ("python", "dia-fast", "torch", "triton", "transformers", "cuda", "hip", "driver_version")

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "DIA_FAST_CPU_PRODUCT")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--csv`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results, versions and commit there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table of the results there")


class Results:
    """The results of one run.

    Args:
        parser: Of the command line; its `prog` names the benchmark.
        options: What it parsed, with those of `add_options`.
        arguments: What it was given; None stands for `sys.argv`.
        device: That was measured; by default the CPU.

    Raises:
        InputError: If a file cannot be written. Nothing has been measured by then.
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        arguments: Sequence[str] | None,
        device: torch.device | None = None,
    ) -> None:
        self._json, self._csv = options.json, options.csv
        self.rows: list[dict[str, dict[str, Scalar]]] = []
        if self._json or self._csv:
            given = sys.argv[1:] if arguments is None else arguments
            self._head = header(parser.prog, given, device or torch.device("cpu"))
            self._write(None)

    def add(self, case: Values, values: Values) -> None:
        """Add a result and write the files.

        Args:
            case: Facts that tell this result from the others of the run, such as `{"requests": 8}`.
            values: Measured; a name ends with its unit, as `step_ms`. What is not finite is written as null.
        """
        self.extend([(case, values)])

    def extend(self, pairs: Iterable[tuple[Values, Values]]) -> None:
        """Add several results, as `add` does, and write the files once."""
        self.rows += [{"case": _plain(case), "values": _plain(values)} for case, values in pairs]
        self._write(None)

    def end(self, status: int) -> int:
        """Note that the run is complete, and return its exit status."""
        self._write(status)
        return status

    def _write(self, status: int | None) -> None:
        if self._json:
            _put(self._json, dump({**self._head, "status": status, "results": self.rows}))
        if self._csv:
            with _opened(self._csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                rows = [row["case"] | row["values"] for row in self.rows]
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
                writer.writeheader()
                writer.writerows(rows)


def header(prog: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Return all of a file but its results: nothing in it names the host, its folders or its user."""
    facts = {name: value for name, value in collect(device).items() if value is not None}
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    commit = str(facts.pop("commit"))
    return {
        "schema": SCHEMA,
        "bench": prog.rpartition(" ")[2].removeprefix("bench."),
        "argv": [Path(item).name if Path(item).is_absolute() else scrub(item) for item in map(str, arguments)],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.removesuffix("+"),
        "dirty": commit.endswith("+"),
        "versions": {name: str(facts.pop(name)) for name in VERSIONS if name in facts},
        "device": facts.pop("device"),
        "processor": describe_machine(torch.device("cpu")),
        "facts": facts,
        "table": kernel_table(),
    }


def kernel_table() -> dict[str, str]:
    """Return name and SHA-256 of the table that launches take their configs from."""
    named = os.environ.get("DIA_KERNELS_TABLE")
    files = [Path(named)] if named else sorted(launcher.CONFIGS.glob("*.json"))
    try:
        content = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise InputError(f"DIA_KERNELS_TABLE: cannot read {named}: {error.strerror}") from error
    return {"name": Path(named).name if named else "default", "sha256": hashlib.sha256(content).hexdigest()}


def dump(run: Mapping[str, Any]) -> str:
    """Return the JSON of a run, a line for each result: a change shows as one."""
    head = json.dumps({name: value for name, value in run.items() if name != "results"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in run["results"])
    return f'{head[:-2]},\n "results": [\n{rows}\n ]\n}}\n'


def read(path: Path) -> dict[str, Any]:
    """Return the run in a file that a benchmark wrote.

    Raises:
        InputError: If it cannot be read or is not of the schema.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if (problem := fault(run)) is not None:
        raise InputError(f"{path} was not written by a benchmark's --json: {problem}")
    return dict(run)


def fault(run: Any) -> str | None:
    """Return the first way in which a value is no run of this schema, or None."""
    if not isinstance(run, dict) or set(run) != set(FIELDS):
        return f"its entries must be {', '.join(FIELDS)}"
    for name, kind in FIELDS.items():
        if not isinstance(run[name], kind):
            return f"{name} is a {type(run[name]).__name__}"
    if run["schema"] != SCHEMA:
        return f"it has schema {run['schema']}, and this version reads {SCHEMA}"
    if set(run["table"]) != {"name", "sha256"}:
        return "table must have name and sha256"
    for index, row in enumerate(run["results"]):
        if not isinstance(row, dict) or set(row) != {"case", "values"} or not all(map(_is_flat, row.values())):
            return f"results[{index}] must be flat objects, case and values"
    return None


def flat(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a run, case and values of each in one dict."""
    return [row["case"] | row["values"] for row in run["results"]]


def _is_flat(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(value, Scalar) for value in part.values())


def _plain(part: Values) -> dict[str, Scalar]:
    for name, value in part.items():
        if not isinstance(value, Scalar):
            raise TypeError(f"{name} must be a number, a string, a truth value or None, not {type(value).__name__}")
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in part.items()}


def _opened(path: Path) -> Any:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    return replacing(path)


def _put(path: Path, text: str) -> None:
    with _opened(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
