"""Damaged and hostile files: refused by name, before memory is taken, and never by an error that is not ours."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config
from dia_fast.audio.audio import load_audio
from dia_fast.audio.codec import CodecConfig, load_codec
from dia_fast.checkpoint.loading import Checkpoint, open_checkpoint
from dia_fast.checkpoint.saving import convert
from dia_fast.checkpoint.tensor_io import open_tensors
from dia_fast.errors import CheckpointError, InputError
from dia_fast.model.config import DiaConfig
from dia_fast.training.data import read_recordings
from dia_fast.utils.files import checked_path, parse_json


def test_mutated_files_of_every_sort() -> None:
    command = [sys.executable, "-m", "tests.helpers.hostile", "2500"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2500 mutated files of 25 sorts" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delay_pattern": [0, 10**9, *range(2, 9)]}, "delay of 1000000000 steps"),
        ({"delay_pattern": [0, 1e9, *range(2, 9)]}, "delay_pattern must be an integer"),
        (
            {"decoder_config": {"max_position_embeddings": 100_000_000}},
            "max_position_embeddings is 100000000, more than",
        ),
        (
            {"encoder_config": {"max_position_embeddings": 100_000_000}},
            "max_position_embeddings is 100000000, more than",
        ),
        ({"encoder_config": {"hidden_size": 1 << 30}}, "hidden_size is 1073741824, more than"),
        ({"encoder_config": {"norm_eps": 10**400}}, "norm_eps must be a positive number"),
        ({"encoder_config": {"norm_eps": 10**5000}}, "norm_eps must be .* thousands of digits"),
    ],
)
def test_values_beyond_any_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiaConfig.from_dict({"model_type": "dia"} | change)


@pytest.mark.parametrize(
    "change",
    [
        {"n_codebooks": 10_000_000},
        {"sampling_rate": 1},
        {"sampling_rate": 1e30},
        {"sampling_rate": 10**30},
        {"downsampling_ratios": [2] * 40},
        {"downsampling_ratios": [1 << 20], "upsampling_ratios": [1 << 20]},
        {"encoder_hidden_size": 1 << 16},
        {"codebook_size": 1 << 40},
        {"hidden_size": 1 << 40},
    ],
)
def test_codec_sizes_beyond_any_codec(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(change)).removeprefix('encoder_')}.* must be a .*not "):
        CodecConfig.from_transformers(change)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "[" * 80 + "]" * 80, "1" * 400, "1" * 5000, '{"a": -1' + "0" * 400 + "}"]
)
def test_json_beyond_use(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json.*(nest|64 bits|limit)"):
        parse_json(text, "config.json")
    for read in (DiaConfig.from_file, open_checkpoint, load_codec):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json"):
            read(tmp_path / "config.json" if read == DiaConfig.from_file else tmp_path)


def _safetensors(path: Path, header: dict[str, Any], body: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return path


def _entry(first: int, last: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, 12, "each byte once"),
        ({"a": _entry(0, 8), "b": _entry(0, 8)}, 8, "each byte once"),
        ({"a": _entry(0, 8), "b": _entry(12, 16)}, 16, "each byte once"),
        ({"a": _entry(0, 8)}, 12, "each byte once"),
        ({"a": _entry(0, 8) | {"dtype": []}}, 8, "its entry for tensor a"),
        ({"a": _entry(0, 8) | {"shape": [True, 2]}}, 8, "its entry for tensor a"),
        ({"a": _entry(0, 8) | {"shape": [2, 10**400]}}, 8, "64 bits"),
        ({"a": []}, 8, "its entry for tensor a"),
    ],
    ids=["overlap", "same place", "hole", "trailing bytes", "dtype", "truth", "huge", "list"],
)
def test_headers_that_lie(header: dict[str, Any], body: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{message}"):
        open_tensors(_safetensors(tmp_path / "model.safetensors", header, body))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.ones(1).expand(1 << 41),
        lambda: torch.ones(1 << 12).as_strided((1 << 10, 1 << 10), (1, 1)),
        lambda: torch.ones(3).to_sparse(),
    ],
    ids=["meta", "nested", "expanded", "overlapping", "sparse"],
)
def test_pickled_tensors_that_do_not_lie_in_the_file(make: Callable[[], torch.Tensor], tmp_path: Path) -> None:
    torch.save({"a": make()}, tmp_path / "dia.pth")
    with pytest.raises(CheckpointError, match=r"dia.pth"):
        open_tensors(tmp_path / "dia.pth")
    config = CodecConfig().to_official()
    torch.save({"state_dict": {"a": make()}, "metadata": {"kwargs": config}}, tmp_path / "codec.pth")
    with pytest.raises(CheckpointError, match=r"codec.pth.*(expected plain tensors|repeats|damaged)"):
        load_codec(tmp_path / "codec.pth")


NAMES = ["x" * 300, "~nosuchuser/x", "a\0b", "\ud800", "a/" * 3000, "/proc/1/root/x/../" + "y" * 256]
DOORS: dict[str, Callable[[str], object]] = {
    "model": lambda name: open_checkpoint(name, local_files_only=True),
    "codec": lambda name: load_codec(name, local_files_only=True),
    "convert": lambda name: convert(name, "/nowhere/at/all", local_files_only=True),
    "audio": lambda name: load_audio(name, 8000),
    "recordings": read_recordings,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_no_system_looks_up(door: str, name: str) -> None:
    with pytest.raises((InputError, CheckpointError)):
        DOORS[door](name)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def refused(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path / "closed")):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(InputError, match="cannot be looked up: Permission denied"):
        checked_path(tmp_path / "closed" / "x")


def test_no_memory_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_transformers_checkpoint(tmp_path, tiny_config()))

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CheckpointError, match=r"cpu has no room for the weights: \d.*GiB in float32"):
        Checkpoint.load(checkpoint)
