"""Writing: conversion there and back is exact, transformers loads what is saved, and a failure leaves nothing."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from bench.make_checkpoint import main as make_checkpoint
from bench.tools.tiny_models import (
    make_original_checkpoint,
    make_transformers_checkpoint,
    original_state,
    random_state,
    tiny_config,
    transformers_model,
)
from dia_fast.checkpoint import saving as module
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import convert, save_pretrained
from dia_fast.errors import CheckpointError, InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from tests.helpers.strategies import configs


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype is b[name].dtype for name in a)


def random_weights(config: DiaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in fused_shapes(config).items()}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(tiny_config())


def test_from_transformers_to_original(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = make_transformers_checkpoint(tmp_path / "source", max_shard_size="1MB")
    expected = original_state(tiny_config(), state)
    folder = convert(source, tmp_path / "safetensors", "original")
    assert same(load_file(folder / "model.safetensors"), expected)
    folder = convert(source, tmp_path / "pickled", "original", pickled=True, dtype=torch.bfloat16)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert same(weights, {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert (folder / "pytorch_model.bin").stat().st_size < 1.1 * sum(t.nbytes for t in weights.values())


@pytest.mark.parametrize("file", ["model.safetensors", "dia.pth"])
def test_from_original_to_transformers(tmp_path: Path, state: dict[str, Tensor], file: str) -> None:
    source = make_original_checkpoint(tmp_path / "source", file=file)
    folder = convert(source, tmp_path / "new" / "folder")
    assert same(load_file(folder / "model.safetensors"), state)


@settings(max_examples=12)
@given(configs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(5_000, 50_000))
def test_there_and_back_for_any_configuration(config: DiaConfig, dtype: torch.dtype, shard: int) -> None:
    weights = random_weights(config, dtype)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        save_pretrained(root / "a", config, weights, max_shard_bytes=shard)
        convert(root / "a", root / "b", "original")
        convert(root / "b", root / "c", max_shard_bytes=shard)
        for name in "abc":
            checkpoint = open_checkpoint(root / name)
            assert checkpoint.config == config
            assert same(checkpoint.load(), weights)
        files = [path.name for path in sorted((root / "a").iterdir())]
        assert files == [path.name for path in sorted((root / "c").iterdir())]
        assert all((root / "a" / name).read_bytes() == (root / "c" / name).read_bytes() for name in files)


def test_several_dtypes_are_kept(tmp_path: Path) -> None:
    """The original package keeps its norms in float32 when the rest is in half precision."""
    config = tiny_config(encoder={"vocab_size": 255, "hidden_size": 33})
    weights = random_weights(config, torch.bfloat16)
    weights |= {name: torch.randn(tensor.shape) for name, tensor in weights.items() if tensor.ndim == 1}
    folder = convert(save_pretrained(tmp_path / "a", config, weights), tmp_path / "b", "original")
    checkpoint = open_checkpoint(folder)
    assert same({name: checkpoint.load_fused(name) for name in weights}, weights)
    assert checkpoint.dtype is torch.bfloat16
    assert load_file(folder / "model.safetensors")["encoder.norm.weight"].dtype is torch.float32
    for path in (tmp_path / "a", folder):
        for tensor in open_checkpoint(path).tensors.values():
            assert tensor.offset % tensor.dtype.itemsize == 0, tensor.name


@pytest.mark.parametrize("shard", [10**9, 10**6, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_is_saved(tmp_path: Path, shard: int, dtype: torch.dtype) -> None:
    from transformers import DiaForConditionalGeneration

    config = tiny_config(decoder={"bos_token_id": 1027})
    source = make_transformers_checkpoint(tmp_path / "source", config, dtype=dtype)
    weights = open_checkpoint(source).load()
    folder = save_pretrained(tmp_path / "saved", config, weights, max_shard_bytes=shard)
    model, report = DiaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype is dtype
    assert same(model.state_dict(), transformers_model(config, dtype=dtype).state_dict())
    settings = model.generation_config
    assert (settings.do_sample, settings.guidance_scale, settings.temperature) == (True, 3.0, 1.2)
    assert (settings.top_k, settings.top_p, settings.max_length) == (45, 0.95, 320)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1027, 1024, 1025)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    for change, message in (
        ({"decoder.norm": torch.ones(47)}, r"weight decoder\.norm has shape \[47\]; expected \[48\]"),
        ({"decoder.norm": None}, r"weight decoder\.norm is missing"),
    ):
        given = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        with pytest.raises(CheckpointError, match=message):
            save_pretrained(tmp_path / "new", tiny_config(), given)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    save_pretrained(empty, tiny_config(), weights)
    for taken in (full, file, empty):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            save_pretrained(taken, tiny_config(), weights)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_the_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    folder = save_pretrained(tmp_path / "saved", tiny_config(), random_weights(tiny_config()))
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("failure", ["tensors", "index", "interrupt"])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def fail(*args: Any) -> None:
        if failure == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail) if failure != "index" else monkeypatch.setattr(
        module, "_write_json", fail
    )
    expected = (
        pytest.raises(KeyboardInterrupt)
        if failure == "interrupt"
        else pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*new: No space left")
    )
    with expected:
        save_pretrained(tmp_path / "new", tiny_config(), random_weights(tiny_config()), max_shard_bytes=10**6)
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, signal, sys
from dia_fast.checkpoint.saving import convert
from dia_fast.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    convert(sys.argv[1], sys.argv[2], "original", pickled=sys.argv[3] == "pickled")
except CheckpointError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes the POSIX way")
@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_a_disk_that_takes_no_more(tmp_path: Path, form: str) -> None:
    source = save_pretrained(tmp_path / "source", tiny_config(), random_weights(tiny_config()))
    command = [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "new"), form]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 1, done.stderr
    assert "cannot write the checkpoint" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint .*file/new"):
        save_pretrained(tmp_path / "file" / "new", tiny_config(), random_weights(tiny_config()))


def test_bad_arguments(tmp_path: Path) -> None:
    for arguments, message in (
        ({"layout": "gguf"}, "layout 'gguf' is unknown; 'transformers' and 'original'"),
        ({"dtype": torch.int8}, "cannot be written as torch.int8"),
        ({"pickled": True}, "only the original layout"),
    ):
        with pytest.raises(InputError, match=message):
            convert(tmp_path, tmp_path / "new", **arguments)


def test_a_bad_source_leaves_nothing(tmp_path: Path) -> None:
    source = save_pretrained(tmp_path / "source", tiny_config(), random_weights(tiny_config()))
    os.truncate(source / "model.safetensors", 1_000_000)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "new", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_for_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("bench.make_checkpoint.DiaConfig", tiny_config)
    assert make_checkpoint([str(tmp_path / "new"), "--layers", "1", "2"]) == 0
    assert "random weights, bfloat16" in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "new")
    assert checkpoint.config.encoder.num_hidden_layers == 1
    head = checkpoint.load()["decoder.head"]
    assert abs(head.float().std() * head.shape[1] ** 0.5 - 1) < 0.01
    assert make_checkpoint([str(tmp_path / "new")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
