"""Checkpoints that hold matrices in 8 bits: written, read back as such or widened, and refused when damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config
from dia_fast import Dia
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import convert
from dia_fast.errors import CheckpointError, InputError
from dia_fast.model.quantization import INT8, INT8_MLP, quantized_names
from dia_kernels.reference.quantized import Int8Weight, quantize

CONFIG = tiny_config()
NAME = "model.decoder.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    make_transformers_checkpoint(folder, CONFIG, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("weights", [INT8, INT8_MLP])
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_what_is_written_is_what_is_rounded_at_load(source: Path, tmp_path: Path, weights: str, shard: int) -> None:
    convert(source, tmp_path / "out", weights=weights, max_shard_bytes=shard)
    plain, written = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert written.weights == weights and plain.weights == "float"
    assert written.dtype is torch.bfloat16 and written.stored_bytes < 0.8 * plain.stored_bytes
    names = quantized_names(CONFIG, weights)
    wide = written.load(torch.float32)
    for name, ours in written.load_as(None).items():
        theirs = plain.load_as(weights)[name]
        if name not in names:
            assert torch.equal(ours, theirs)
            continue
        assert isinstance(ours, Int8Weight) and isinstance(theirs, Int8Weight)
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.scales, theirs.scales)
        assert torch.equal(wide[name], ours.unpack())


def test_a_converted_checkpoint_loads_as_it_is_and_says_so(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "out", weights=INT8)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized" and config["dtype"] == "bfloat16"
    assert config["quantization_config"]["ignore"] == []
    assert Dia.from_pretrained(folder, device="cpu", codec=None).model.packed
    assert not Dia.from_pretrained(folder, device="cpu", codec=None, weights="float").model.packed
    again = convert(folder, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    back = open_checkpoint(convert(folder, tmp_path / "back", "original", dtype=torch.float32))
    assert back.weights == "float"
    assert torch.equal(back.load()["decoder.head"], open_checkpoint(folder).load_int8("decoder.head").unpack())


def test_8_bits_are_for_the_transformers_layout(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers layout alone"):
        convert(source, tmp_path / "out", "original", weights=INT8)
    with pytest.raises(InputError, match="weights 'int4' is unknown"):
        convert(source, tmp_path / "out", weights="int4")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda t: t.pop(f"{NAME}_scale"), "int8, but its scales, .* are missing"),
        (lambda t: t.update({f"{NAME}_scale": t[f"{NAME}_scale"].T.contiguous()}), "expected .*a scale for each"),
        (lambda t: t.update({f"{NAME}_scale": t[f"{NAME}_scale"].int()}), "expected .*a scale for each"),
        (lambda t: t.update({NAME: t[NAME].float()}), "is there, but tensor .* is float32"),
        (lambda t: t.pop(NAME), "missing, though config.json"),
        (lambda t: t[f"{NAME}_scale"].fill_(torch.nan), "scales must be finite and above 0"),
        (lambda t: t[f"{NAME}_scale"].fill_(-1), "scales must be finite and above 0"),
        (
            lambda t: t.update({"model.encoder.norm.weight": t["model.encoder.norm.weight"].to(torch.int8)}),
            "int8, but its scales",
        ),
        (lambda t: t.update({"model.nothing.weight_scale": torch.ones(3, 1)}), "without the tensors that they scale"),
    ],
)
def test_damaged_checkpoints_are_refused(source: Path, tmp_path: Path, change, wrong: str) -> None:
    folder = convert(source, tmp_path / "out", weights=INT8)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    for load in (lambda c: c.load(), lambda c: c.load_as(None)):
        with pytest.raises(CheckpointError, match=wrong):
            load(open_checkpoint(folder))


def test_a_quantized_row_of_a_fused_matrix_is_its_own(source: Path) -> None:
    """q, k and v are tensors of their own in a file: their rows are rounded by themselves, so it does not matter."""
    checkpoint = open_checkpoint(source)
    fused = checkpoint.load_fused("decoder.layers.0.qkv")
    assert torch.equal(quantize(fused[5:9]).values, quantize(fused).values[5:9])
