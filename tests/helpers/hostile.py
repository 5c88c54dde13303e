"""A fuzzer of every file that is read: mutates real files by seeds, and accepts success or an error of dia_fast alone.

    python -m tests.helpers.hostile 2000            # cases 0 to 1999
    python -m tests.helpers.hostile --only 1234     # one of them again

It limits its own memory and the time of each case, so it runs as a process of its own.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import soundfile
import torch

from bench.tools.codec_files import save_official
from bench.tools.tiny_models import make_original_checkpoint, make_transformers_checkpoint, tiny_config
from dia_fast.audio.audio import load_audio
from dia_fast.audio.codec import load_codec, random_codec
from dia_fast.audio.codec.weights import write_transformers
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.diagnostics.roofline import devices
from dia_fast.errors import DiaFastError
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.jobs.items import Defaults, Failed, read_items
from dia_fast.jobs.manifest import Manifest
from dia_fast.model.model import DiaModel
from dia_fast.training.data import read_recordings
from dia_fast.training.options import TrainOptions
from dia_fast.training.run import Run
from dia_kernels import launcher as launch
from dia_kernels import reference
from tests.helpers.codecs import SMALL

SECONDS, BYTES = 10, 2 << 30
"""Seconds and bytes that one case may take; tiny files need some milliseconds and some megabytes."""

DEEP = "[" * 200_000
VALUES = (
    None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 62, 1 << 64, 10**400, 100_000_000, -0.5, 1e30, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "a" * 300, "../../etc", "~nosuchuser/x", "\ud800", [], {}, [[]], [0], [1e9], [None],
    {"a": 1}, {"rope_type": []}, [0] * 9, [2] * 70,
)  # fmt: skip

Reader = Callable[[Path], object]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        targets = make_targets(Path(place))
        for folder, _, read in targets:  # imports what reading needs, and shows that unharmed files are read
            read(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _too_long)
        seeds = range(options.count) if options.only is None else [options.only]
        for seed in seeds:
            failed += not survives(seed, targets)
        print(f"{len(seeds)} mutated files of {len(targets)} sorts, {failed} failures")
    return 1 if failed else 0


def survives(seed: int, targets: list[tuple[Path, str, Reader]]) -> bool:
    """Run one case; a failure is printed with its seed."""
    rng = random.Random(seed)
    folder, name, read = targets[seed % len(targets)]
    victim, sound = folder / name, (folder / name).read_bytes()
    victim.write_bytes(mutated(rng, sound, name))
    begin = time.monotonic()
    signal.alarm(SECONDS)
    try:
        read(folder)
    except DiaFastError:
        pass
    except BaseException:
        took = time.monotonic() - begin
        print(f"--only {seed}: {folder.name}/{name}, {took:.1f} s\n{traceback.format_exc()[-3000:]}")
        return False
    finally:
        signal.alarm(0)
        victim.write_bytes(sound)
    return True


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"a case took longer than {SECONDS} s")


def mutated(rng: random.Random, data: bytes, name: str) -> bytes:
    """The bytes of a file, harmed in one way or two."""
    ways: list[Callable[[random.Random, bytes], bytes]] = [_flip, _cut, _splice, _overwrite]
    if name.endswith((".json", ".jsonl")):
        ways = [_json_value] * 8 + [_json_field] * 2 + [_json_deep] + ways
    elif name.endswith(".safetensors"):
        ways = [_header_value] * 8 + [_flip_header] * 2 + ways
    elif name.endswith((".pth", ".pt", ".bin")):
        ways = [_flip_head] * 4 + ways
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = rng.choice(ways)(rng, data)
    return data


def _flip(rng: random.Random, data: bytes) -> bytes:
    harmed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8))):
        if harmed:
            harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
    return bytes(harmed)


def _flip_head(rng: random.Random, data: bytes) -> bytes:
    """In a zip the pickle is near the beginning."""
    return _flip(rng, data[:3000]) + data[3000:]


def _flip_header(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data[:2000]) + data[2000:]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _splice(rng: random.Random, data: bytes) -> bytes:
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[first:last] + data[at:]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"\0" * 16, b"\xff" * 16, b"9" * 5000, b"\n", b"{", b"")) + data[at + 16 :]


def _json_deep(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((DEEP, '{"a":' * 100_000, "[" * 300 + "]" * 300, "1" * 5000, "")).encode()


def _json_value(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n") if _is_lines(data) else [data]
    at = rng.randrange(len(lines))
    try:
        content = json.loads(lines[at])
    except (ValueError, RecursionError):
        return _flip(rng, data)
    spots = list(_spots(content))
    if spots:
        holder, key = rng.choice(spots)
        holder[key] = rng.choice(VALUES)
    else:
        content = rng.choice(VALUES)
    lines[at] = json.dumps(content).encode()
    return b"\n".join(lines)


def _json_field(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n") if _is_lines(data) else [data]
    at = rng.randrange(len(lines))
    try:
        content = json.loads(lines[at])
    except (ValueError, RecursionError):
        return _flip(rng, data)
    if not isinstance(content, dict) or not content:
        return _flip(rng, data)
    name = rng.choice(list(content))
    value = content.pop(name)
    if rng.random() < 0.5:
        content[rng.choice(("", "x" * 300, name.upper(), "\ud800"))] = value
    lines[at] = json.dumps(content).encode()
    return b"\n".join(lines)


def _is_lines(data: bytes) -> bool:
    return data.endswith(b"}\n") and data.count(b"}\n{") > 0


def _spots(content: Any) -> Any:
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield content, key
            yield from _spots(value)


def _header_value(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        entry = header[rng.choice(list(header))]
        part = rng.choice(("dtype", "shape", "data_offsets"))
        if isinstance(entry.get(part), list) and rng.random() < 0.7:
            at = rng.randrange(len(entry[part]))
            entry[part][at] = rng.choice((*VALUES, entry[part][at] + 4, entry[part][at] - 4))
        else:
            entry[part] = rng.choice((*VALUES, "F16", "I64", "F8_E5M2", "F4"))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return struct.pack("<Q", rng.choice((0, 1, 1 << 20, 1 << 62, (1 << 64) - 1))) + data[8:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def make_targets(place: Path) -> list[tuple[Path, str, Reader]]:
    """(folder, file to harm, what reads the folder), once for each sort of file that is read."""
    targets: list[tuple[Path, str, Reader]] = []
    sharded = make_transformers_checkpoint(place / "sharded", max_shard_size="100KB")
    whole = make_transformers_checkpoint(place / "whole")
    old = make_original_checkpoint(place / "original", file="dia.pth")
    make_original_checkpoint(place / "bin", file="pytorch_model.bin")
    for folder, name in (
        (whole, "config.json"), (old, "config.json"), (whole, "generation_config.json"), (whole, "model.safetensors"),
        (sharded, "model.safetensors.index.json"), (old, "dia.pth"), (place / "bin", "pytorch_model.bin"),
    ):  # fmt: skip
        targets.append((folder, name, _read_checkpoint))
    codec = random_codec(SMALL)
    new = write_transformers(place / "codec", SMALL, codec.network.tensors())
    targets += [(new, name, load_codec) for name in ("config.json", "preprocessor_config.json", "model.safetensors")]
    for zipped in (True, False):
        folder = place / f"official{zipped:d}"
        folder.mkdir()
        save_official(codec, folder / "weights.pth", "old", zipped)
        targets.append((folder, "weights.pth", load_codec))
    return targets + _adapter_targets(place, whole) + _small_targets(place)


def _read_checkpoint(folder: Path) -> object:
    checkpoint = open_checkpoint(folder)
    return DiaModel(checkpoint.config, reference).load(checkpoint.load())


def _adapter_targets(place: Path, base: Path) -> list[tuple[Path, str, Reader]]:
    from safetensors.torch import save_file

    folder = place / "adapter"
    folder.mkdir()
    shutil.copytree(base, folder / "base")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.decoder.layers.0.mlp.down_proj"
    config = tiny_config().decoder
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, config.intermediate_size),
        f"{name}.lora_B.weight": torch.ones(config.hidden_size, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return [(folder, name, _read_checkpoint) for name in ("adapter_config.json", "adapter_model.safetensors")]


def _small_targets(place: Path) -> list[tuple[Path, str, Reader]]:
    """Audio, lines of JSON, and files of settings."""
    targets: list[tuple[Path, str, Reader]] = []

    def add(name: str, content: str | None, read: Reader) -> Path:
        folder = place / f"small{len(targets)}"
        folder.mkdir()
        if content is not None:
            (folder / name).write_text(content)
        targets.append((folder, name, read))
        return folder / name

    tone = np.sin(np.arange(2000) / 10).astype(np.float32)
    for name in ("voice.wav", "voice.flac", "voice.ogg"):
        path = add(name, None, lambda folder, name=name: load_audio(folder / name, 8000))  # type: ignore[misc]
        soundfile.write(path, tone, 8000)
    lines = [{"id": "a", "text": "[S1] Hello.", "seed": 3}, {"id": "b", "text": "[S1] So.", "temperature": 0.5}]
    add("items.jsonl", _lines(lines), _read_items)
    done = {"line": 1, "id": "a", "status": "done", "file": "a.wav", "bytes": 3, "fingerprint": "x", "duration": 1.0}
    failed = {"line": 2, "id": "b", "status": "failed", "error": "e"}
    add("manifest.jsonl", _lines([done, failed]), lambda folder: Manifest(folder / "manifest.jsonl").load())
    entries = [{"audio": "a.wav", "text": "[S1] Hello."}, {"audio": "b.wav", "text": "[S1] So."}]
    add("data.jsonl", _lines(entries), lambda folder: read_recordings(folder / "data.jsonl"))
    gpu = {"like": "h100", "name": "mine", "bandwidth_gbs": 2000}
    add("gpu.json", json.dumps(gpu), lambda folder: devices.read(folder / "gpu.json"))
    table = {min(launch.OPS): [{"where": {"arch": "sm_90", "rows": 1}, "use": {"BLOCK_N": 8}}]}
    add("table.json", json.dumps(table), _read_table)
    stored = {"options": TrainOptions(model="model", data="data").to_dict(), "data": "digest"}
    add("run.json", json.dumps(stored), lambda folder: Run.reopen(folder, {}))
    log = add("log.jsonl", _lines([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]), _read_run)
    (log.parent / "run.json").write_text(json.dumps(stored))
    state = add("states", None, _read_run).parent
    targets[-1] = (state, "states/step-00000001.pt", _read_run)
    (state / "states").mkdir()
    (state / "run.json").write_text(json.dumps(stored))
    torch.save({"step": 1, "weights": {"w": torch.ones(3)}, "optimizer": {}}, state / "states/step-00000001.pt")
    return targets


def _lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _read_items(folder: Path) -> None:
    for item in read_items(folder / "items.jsonl", Defaults(SamplingParams())):
        assert isinstance(item, Failed) or item.id


def _read_table(folder: Path) -> None:
    """`get_ops` turns the ValueError of a table into one of dia_fast."""
    launch.read_table.cache_clear()
    try:
        launch.read_table(os.fspath(folder / "table.json"))
    except ValueError as error:
        if "table.json" not in str(error):
            raise


def _read_run(folder: Path) -> None:
    run = Run.reopen(folder, {})
    list(run.lines())
    if run.last_step:
        run.load(run.last_step)


if __name__ == "__main__":
    raise SystemExit(main())
