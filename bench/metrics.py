"""Measure the figures of the regression gate: five groups, each taken in a process of its own.

    python -m bench.metrics GROUP FOLDER FILE

Writes the figures of one group to FILE as JSON; FOLDER is where a checkpoint is made, once for all groups that need
one. `bench.check` calls it. No GPU is needed: kernels are interpreted for `traffic` and compiled for `codegen`.
"""

import os
import sys

if __name__ == "__main__" and sys.argv[1:2] != ["codegen"]:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported; only codegen compiles

import argparse
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baseline import Group, Kind, group_of
from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.cpu_weights import instruction_set

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_90", "gfx942", "gfx1100")
COUNTED = "none: counted, the same every time"
COMPILED = "none: compiling again gives the same code"
REPEATED = ("memory", "ratio")  # groups whose figures differ from run to run


def small_config() -> DiaConfig:
    """Two decoder layers with shared heads of the real size, all channels and few codes: soon interpreted."""
    config = DiaConfig()
    decoder = replace(
        config.decoder, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, cross_num_attention_heads=2, cross_num_key_value_heads=2, vocab_size=140,
        eos_token_id=128, pad_token_id=129, bos_token_id=130,
    )  # fmt: skip
    return replace(config, decoder=decoder)


def launches() -> Group:
    """Kernels that a decode step launches, at the size of Dia-1.6B and of a small model, with and without guidance."""
    from dia_fast.diagnostics.launches import all_layers, decode
    from dia_kernels import launcher as launch
    from dia_kernels import triton as kernels

    values: dict[str, dict[str, float]] = {}
    for name, config in (("Dia-1.6B", DiaConfig()), ("two layers", small_config())):
        for rows in (1, 2):
            seen: list[Any] = []
            # Noted, not run: the tensors are on the meta device.
            with torch.inference_mode(), launch.listening(lambda *call, seen=seen: seen.append(call)):
                decode(rows, torch.bfloat16, model=all_layers(torch.bfloat16, kernels, config))
            values[f"{name}, rows {rows}"] = {"launches": len(seen)}
    return Group({"launches": Kind("launches", "lower", 0.0, 0.0, COUNTED)}, values)


def traffic(
    rows: Sequence[int] = (1, 2, 8), contexts: Sequence[int] = (40, 300), config: DiaConfig | None = None
) -> Group:
    """Bytes that the kernels of one small layer move, by `bench.traffic`, under the repaired interpreter."""
    from bench.traffic import measure

    values: dict[str, dict[str, float]] = {}
    for count in rows:
        with torch.inference_mode():
            found = measure(config or small_config(), count, contexts, torch.bfloat16)
        for item in found:
            values[unused(f"{item.kernel}, rows {count}, context {item.context}", values)] = {
                "moved": item.moved, "read again": item.again, "not read once": int(not item.weights_once),
            }  # fmt: skip
    return Group(
        {
            "moved": Kind("bytes", "lower", 0.0, 0.0, COUNTED),
            "read again": Kind("bytes", "lower", 0.0, 0.0, COUNTED),
            "not read once": Kind("launches", "lower", 0.0, 0.0, COUNTED),
        },
        values,
    )


def codegen(targets: Sequence[str] = TARGETS, rows: Sequence[int] = (2,)) -> Group:
    """Return figures of the machine code of every kernel in bf16 at the shapes of Dia-1.6B, by `bench.codegen`."""
    from bench.codegen import report

    values: dict[str, dict[str, float]] = {}
    for line in report(targets, rows, ["bfloat16"]):
        figures: dict[str, float] = {
            "registers": line.registers, "spills": line.spills, "shared": line.shared,
            "instructions": line.instructions,
        }  # fmt: skip
        if line.issue:  # it streams weights, and they can be told from the rest
            figures |= {"in flight": round(line.in_flight), "issue": round(line.issue, 4)}
        values[unused(f"{line.target} {line.kernel}", values)] = figures
    few = "; an edit that changes nothing else may add so much"
    return Group(
        {
            "registers": Kind("registers", "lower", 0.0, 8.0, COMPILED + "; GPUs hand registers out in eights"),
            "spills": Kind("bytes or registers", "lower", 0.0, 0.0, COMPILED),
            "shared": Kind("bytes", "lower", 0.0, 256.0, COMPILED + few),
            "instructions": Kind("instructions", "lower", 0.03, 0.0, COMPILED + few),
            "in flight": Kind("bytes per unit", "higher", 0.0, 0.0, COMPILED),
            "issue": Kind("share of slots", "lower", 0.03, 0.0, COMPILED + few),
        },
        values,
        versions={"triton": installed("triton")},
    )


def memory(folder: Path) -> Group:
    """Memory of this process while a checkpoint is loaded as `Dia.from_pretrained` does and two requests are spoken.

    Beside it the bytes of keys, values and scratch for eight requests of full length at the size of Dia-1.6B. The
    product of matrices is named, since each has a peak of its own: that of FBGEMM runs on every x86 processor.
    """
    from dia_fast.api import Dia
    from dia_fast.engine import Request
    from dia_fast.engine.memory import sizes_for_any
    from dia_fast.model.decode_state import DecodeState
    from dia_kernels import get_ops

    before = resident("VmRSS")
    forget_peak()
    dia = Dia.from_pretrained(
        folder, device="cpu", dtype="bfloat16", codec=None, max_batch=2, memory=1 << 28, pack="fbgemm-fp16"
    )
    loading, loaded = resident("VmHWM") - before, resident("VmRSS")
    forget_peak()
    texts = [[1] * 60, [2] * 60]
    handles = [dia.engine.submit(Request(ids, None, 100, seed=0)) for ids in texts]
    for handle in handles:
        handle.result()
    speaking = resident("VmHWM") - loaded
    config, meta = DiaConfig(), torch.device("meta")
    sizes = sizes_for_any(config, 8, 1 << 40, torch.bfloat16, meta)
    state = DecodeState(config, get_ops("torch"), sizes, torch.bfloat16, meta)
    return Group(
        {
            "peak": Kind("bytes", "lower", 0.02, float(4 << 20), "pages that the allocator keeps"),
            "allocated": Kind("bytes", "lower", 0.0, 0.0, COUNTED),
        },
        {
            "loading": {"peak": loading},
            "speaking, beyond what was loaded": {"peak": speaking},
            "pages and scratch of Dia-1.6B, 8 requests": {"allocated": storage_bytes(state)},
        },
        versions={"torch": installed("torch")},
        machine={"architecture": platform.machine()},
    )


def ratio(folder: Path, steps: int = 16, rounds: int = 3, requests: Sequence[int] = (1, 4), text: int = 60) -> Group:
    """Count the steps made in the processor time of one step of transformers, on the same bf16 weights."""
    from bench.decode_step import requests_for
    from bench.measure import least, load, our_run, step_times, their_run

    torch.manual_seed(0)
    options = argparse.Namespace(
        model=str(folder), dtype="bfloat16", weights="float", device="cpu", backend="torch", against="transformers",
        text=text, prompt=0, steps=steps, guidance=3.0,
    )  # fmt: skip
    model, theirs = load(options)
    values: dict[str, dict[str, float]] = {}
    for batch in requests:
        asked = requests_for(model.config, argparse.Namespace(**vars(options), batch=batch))
        runs = our_run(model, asked), their_run(theirs, model.config, asked)
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for run, spans in zip(runs, taken, strict=True):
                spans.append(least(step_times(run)).cpu)
        values[f"requests: {batch}"] = {"times transformers": min(taken[1]) / min(taken[0])}
    return Group({"times transformers": _LEAD}, values, machine={"instruction set": instruction_set()})


_LEAD = Kind("ratio", "higher", 0.1, 0.0, "caches and memory are shared, and differ from host to host of one processor")
BARS: dict[str, Mapping[int, float]] = {
    "amx": {1: 1.0, 4: 1.0},
    "avx512_bf16": {1: 1.0, 4: 1.0},
    "avx512": {1: 1.0, 4: 1.0},
    "avx2": {1: 1.7, 4: 3.0},
    "other": {1: 0.0, 4: 0.0},
}
"""The least `ratio`, before the noise of its kind is taken off, by instruction set and requests.

No run is recorded for it: hosts of the same processor gave 6.6 and 3.5 times transformers for four requests.
"""


def required() -> dict[str, Group]:
    """Return the groups that are judged by bars, in the place of recorded ones."""
    isa = instruction_set()
    values = {f"requests: {requests}": {"times transformers": least} for requests, least in BARS[isa].items()}
    return {"ratio": Group({"times transformers": _LEAD}, values, machine={"instruction set": isa})}


def checkpoint(folder: Path) -> Path:
    """Random weights with the widths of Dia-1.6B and one layer on each side, made in a process of its own if needed."""
    path = folder / "model"
    if not path.exists():
        command = [sys.executable, "-m", "bench.make_checkpoint", str(path), "--layers", "1", "1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


GROUPS: dict[str, Callable[[Path], Group]] = {
    "launches": lambda folder: launches(),
    "traffic": lambda folder: traffic(),
    "codegen": lambda folder: codegen(),
    "memory": lambda folder: memory(checkpoint(folder)),
    "ratio": lambda folder: ratio(checkpoint(folder)),
}


def in_a_process(name: str, folder: Path) -> Group:
    """Return the figures of one group, taken in a new process with one thread. Raises InputError if that fails."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    paths = [str(ROOT), str(ROOT / "kernels"), kept.get("PYTHONPATH", "")]
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    file = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.metrics", name, str(folder), str(file)]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    if done.returncode:
        said = [f"{name}: could not be measured, the process ended with {done.returncode}:"]
        raise InputError("\n  ".join([*said, *done.stderr.strip().splitlines()[-8:]]))
    try:
        return group_of(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def installed(package: str) -> str:
    """Its version without what says for which hardware it was built."""
    return version(package).split("+")[0]


def unused(name: str, taken: Iterable[str]) -> str:
    """name, or with a number behind it if it is taken."""
    count = sum(1 for other in taken if re.fullmatch(re.escape(name) + r"( \(\d+\))?", other))
    return f"{name} ({count + 1})" if count else name


def resident(field: str) -> int:
    """Bytes of memory that this process holds (`VmRSS`) or has held since `forget_peak` (`VmHWM`), as Linux counts."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not found:
        raise InputError(f"/proc/self/status has no {field}: memory can be measured on Linux only")
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Start `VmHWM` anew."""
    Path("/proc/self/clear_refs").write_text("5")


def storage_bytes(holder: Any) -> int:
    """Bytes of all tensors that an object holds, storages that several of them share counted once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        elif isinstance(item, list | tuple):
            for part in item:
                visit(part)
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            for part in vars(item).values():
                visit(part)

    visit(holder)
    return sum(sizes.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="metrics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.group == "traffic":
        from bench.tools.interpreter import install

        install()
    group = GROUPS[options.group](options.folder)
    options.file.write_text(json.dumps(asdict(group)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
