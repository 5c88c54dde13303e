"""Faults of a checkpoint are named: the file, the tensor, the value. Nothing of a bad pickle is ever run."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.tools.tiny_models import tiny_config
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.errors import CheckpointError
from dia_fast.model.fused_weights import fused_shapes

NORM = "model.decoder.norm.weight"
DOWN = "model.encoder.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {name: torch.rand(shape) for name, shape in fused_shapes(tiny_config()).items()}
    return save_pretrained(tmp_path_factory.mktemp("good") / "single", tiny_config(), weights)


@pytest.fixture(scope="module")
def good_shards(good: Path) -> Path:
    folder = good.parent / "sharded"
    return save_pretrained(folder, tiny_config(), open_checkpoint(good).load(), max_shard_bytes=500_000)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.fixture
def shards(good_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_shards, tmp_path / "shards"))


def refused(path: Path | str, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).load()
    for part in parts:
        assert part in str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop(NORM), [f"tensor {NORM} is missing", "config.json"]),
        (
            lambda s: [s.pop(n) for n in list(s) if "encoder.layers" in n],
            ["tensors model.encoder.layers.0.", "more are"],
        ),
        (
            lambda s: s.update({"model.lora.weight": torch.ones(2)}),
            ["tensor model.lora.weight is not part of the model"],
        ),
        (lambda s: s.update({NORM: torch.ones(47)}), [NORM, "has shape [47]", "asks for [48]"]),
        (lambda s: s.update({DOWN: s[DOWN].T.contiguous()}), [DOWN, "has shape [64, 32]", "asks for [32, 64]"]),
        (lambda s: s.update({NORM: s[NORM].long()}), [NORM, "has dtype int64", "float32, float16, bfloat16"]),
        (lambda s: s.clear(), ["not those of Dia in either official layout", "none at all"]),
        (
            lambda s: s.update({"h.0.attn": s.popitem()[1]}) or [s.pop(n) for n in list(s) if "h." not in n],
            ["h.0.attn"],
        ),
    ],
)
def test_a_wrong_tensor_is_named(copy: Path, change: Any, parts: list[str]) -> None:
    edit(copy, change)
    refused(copy, str(copy / "model.safetensors"), *parts)


def test_a_config_that_does_not_fit_names_the_first_tensor(copy: Path) -> None:
    data = json.loads((copy / "config.json").read_text())
    data["decoder_config"]["intermediate_size"] = 90
    (copy / "config.json").write_text(json.dumps(data))
    refused(copy, "model.decoder.layers.0.mlp.gate_up_proj.weight", "has shape [192, 48]", "asks for [180, 48]")


def test_a_truncated_file_names_a_tensor(copy: Path) -> None:
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refused(copy, str(file), "is truncated: tensor logits_dense.weight ends at byte")


def test_a_file_that_shrinks_while_it_is_read(copy: Path) -> None:
    checkpoint = open_checkpoint(copy)
    os.truncate(copy / "model.safetensors", 1_000_000)
    with pytest.raises(CheckpointError, match=r"is truncated: it ends within tensor (model|logits)"):
        checkpoint.load()


@settings(max_examples=60)
@given(length=st.floats(0, 1), at=st.floats(0, 1), byte=st.integers(0, 255))
def test_any_cut_and_any_changed_byte_of_the_header(
    good: Path, tmp_path_factory: pytest.TempPathFactory, length: float, at: float, byte: int
) -> None:
    content = bytearray((good / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(good / "config.json", folder)
    (folder / "model.safetensors").write_bytes(content[: int(length * (len(content) - 1))])
    refused(folder, "model.safetensors")
    content[int(at * (header - 1))] = byte
    (folder / "model.safetensors").write_bytes(content)
    try:
        open_checkpoint(folder).load()  # a changed byte may be harmless: a space, the metadata
    except CheckpointError as error:
        assert "model.safetensors" in str(error)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "its header is not JSON"),
        (b'{"a": 3}', "its entry for tensor a is 3"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', "entry for tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "entry for tensor a"),
        (
            b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
            "tensor a of shape [3] and dtype F32 has 8 bytes",
        ),
        (
            b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}',
            "tensor a has dtype F4, which cannot be read",
        ),
    ],
)
def test_a_damaged_header(copy: Path, header: bytes, part: str) -> None:
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(copy, str(copy / "model.safetensors"), part)


def test_shards_that_do_not_fit_together(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("model-*.safetensors"))
    content = second.read_bytes()
    second.unlink()
    refused(shards, f"{second} is missing")
    second.write_bytes(first.read_bytes())
    refused(shards, "is in both", str(first), str(second))
    second.write_bytes(content[:-10])
    refused(shards, str(second), "truncated")


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("{", "is not JSON"),
        ('{"weight_map": 3}', "no readable weight_map"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "must lie in the same folder"),
        ('{"weight_map": {"a": 3}}', "shard 3"),
    ],
)
def test_a_bad_index(shards: Path, index: str, part: str) -> None:
    path = shards / "model.safetensors.index.json"
    path.write_text(index)
    refused(shards, str(path), part)


def test_nothing_to_load(copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "no such folder", "no such file or folder")
    refused("weights.pth", "weights.pth: no such file or folder, and not the id of a Hub repository")
    refused("folder/weights.pth", "no such file or folder")
    weights = copy / "model.safetensors"
    weights.rename(copy / "one.safetensors")
    shutil.copy(copy / "one.safetensors", copy / "two.safetensors")
    refused(copy, "several files of weights: one.safetensors, two.safetensors", "Name the one")
    (copy / "one.safetensors").unlink()
    (copy / "two.safetensors").unlink()
    refused(copy, "has no weights: no model.safetensors")
    weights.mkdir()
    refused(weights / "..", "has no weights")
    (copy / "config.json").unlink()
    refused(copy, "has no config.json")


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "dia.pth"])
def test_a_pickle_that_wants_to_run_code_is_refused(copy: Path, tmp_path: Path, form: str, name: str) -> None:
    (copy / "model.safetensors").unlink()
    victim = tmp_path / "victim"
    content = {"encoder.embedding.weight": torch.ones(2), "extra": Attack(victim)}
    if form == "bare":
        (copy / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, copy / name, _use_new_zipfile_serialization=form == "zip")
    refused(copy, str(copy / name), "is refused", "could run code")
    assert not victim.exists()
    if form == "zip":
        refused(copy, ".mkdir)")


def test_pickles_of_something_else(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    path = copy / "dia.pth"
    for content, part in (
        ([torch.ones(2)], "holds a list; expected tensors by name"),
        ({"encoder.norm.weight": 3}, "entry 'encoder.norm.weight' is a int"),
        ({"encoder.norm.weight": torch.ones(2).to_sparse()}, "layout torch.sparse_coo"),
        ({"encoder.norm.weight": torch.ones(32)}, "is missing, though config.json asks for it".replace("is ", "")),
    ):
        torch.save(content, path)
        refused(copy, str(path), part)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.999])
def test_a_truncated_pickle(copy: Path, kept: float) -> None:
    (copy / "model.safetensors").unlink()
    path = copy / "pytorch_model.bin"
    torch.save({"encoder.norm.weight": torch.ones(5000)}, path)
    os.truncate(path, int(kept * path.stat().st_size) if kept < 1 else int(kept))
    refused(copy, str(path), "damaged")


def test_no_memory_on_the_device(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    checkpoint = open_checkpoint(good)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CheckpointError, match=r"cuda has no room for the weights: 0\.00 GiB in bfloat16"):
        checkpoint.load(torch.bfloat16, "cuda")
