"""Whole runs: what they learn, what they write, and that the result loads wherever a checkpoint loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dia_fast import Dia
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import convert
from dia_fast.cli import main
from dia_fast.errors import CheckpointError, InputError, NumericError
from dia_fast.training import TrainOptions, finetune
from tests.helpers.front import TINY, make_codec, tree
from tests.training.corpus import QUICK, given, log_of, make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("train"))


def train(home: Path, output: Path, **options: Any) -> Path:
    return finetune(output, given(home, **options), device="cpu", cache=home / "codes")


def test_the_loss_falls_and_the_model_speaks(home: Path, tmp_path: Path) -> None:
    model = train(home, tmp_path / "run", steps=25, eval_data=home / "data")
    log = log_of(tmp_path / "run")
    losses = [line["loss"] for line in log if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    assert len(losses) == 25 and losses[-1] < losses[0] - 1
    assert [step for step, _ in held_out] == [0, 5, 10, 15, 20, 25] and held_out[-1][1] < held_out[0][1] - 1
    options = TrainOptions("m", "d", **{**QUICK, "steps": 25})
    assert [line["rate"] for line in log if "rate" in line] == [options.rate(step) for step in range(1, 26)]
    assert all(len(line["channels"]) == 9 and line["norm"] > 0 for line in log if "loss" in line)
    assert len(Dia.from_pretrained(model, codec=None).generate_codes("[S1] So.", seed=1, max_new_tokens=30)) > 0


def test_the_result_loads_in_transformers_and_in_the_original_layout(home: Path, tmp_path: Path) -> None:
    from transformers import DiaForConditionalGeneration

    model = train(home, tmp_path / "run", steps=3)
    ours = open_checkpoint(model).load()
    theirs = DiaForConditionalGeneration.from_pretrained(model).state_dict()
    assert torch.equal(theirs["logits_dense.weight"], ours["decoder.head"])
    before = open_checkpoint(home / "model").load()
    assert all(not torch.equal(before[name], ours[name]) for name in ours), "some weight learnt nothing"
    other = open_checkpoint(convert(model, tmp_path / "original", "original")).load()
    assert all(torch.equal(other[name], ours[name]) for name in ours)


def test_the_result_has_the_dtype_of_the_checkpoint_it_began_with(home: Path, tmp_path: Path) -> None:
    half = convert(home / "model", tmp_path / "half", dtype=torch.bfloat16)
    full = open_checkpoint(train(home, tmp_path / "full", model=half, steps=1))
    adapted = open_checkpoint(train(home, tmp_path / "adapted", model=half, steps=1, lora_rank=2))
    assert full.dtype == adapted.dtype == torch.bfloat16


def test_adapters_are_kept_and_merged(home: Path, tmp_path: Path) -> None:
    targets = ["qkv", "cross_kv", "down"]
    model = train(home, tmp_path / "run", lora_rank=3, lora_alpha=12.0, lora_targets=targets)
    folder = tmp_path / "run" / "adapter"
    options = json.loads((folder / "adapter_config.json").read_text())
    assert options["r"] == 3 and options["lora_alpha"] == 12.0
    assert options["target_modules"] == [
        "cross_attention.k_proj", "cross_attention.v_proj", "mlp.down_proj",
        "self_attention.k_proj", "self_attention.q_proj", "self_attention.v_proj",
    ]  # fmt: skip
    adapter = load_file(folder / "adapter_model.safetensors")
    before, after = load_file(home / "model" / "model.safetensors"), load_file(model / "model.safetensors")
    changed = 0
    for name in before:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            changed += 1
            added = 4.0 * adapter.pop(f"{stem}.lora_B.weight") @ adapter.pop(f"{stem}.lora_A.weight")
            assert added.abs().max() > 0
            torch.testing.assert_close(after[name], before[name] + added)
        else:
            assert torch.equal(after[name], before[name]), name
    assert not adapter and changed == 3 + 1 + 3 + 2 + 1  # encoder's qkv and down; decoder's qkv, cross_kv and down
    log = log_of(tmp_path / "run")
    assert log[-2]["loss"] < log[1]["loss"]


def test_accumulation_equals_a_larger_batch(home: Path, tmp_path: Path) -> None:
    for name, sizes in (("one", {"batch_size": 4, "accumulate": 1}), ("four", {"batch_size": 1, "accumulate": 4})):
        train(home, tmp_path / name, steps=3, **sizes, drop_text=0.0, channel_weights=[2.0] + [1.0] * 8)
    one, four = log_of(tmp_path / "one"), log_of(tmp_path / "four")
    for left, right in zip(one, four, strict=True):
        assert left.keys() == right.keys() and left.get("labels") == right.get("labels")
        for name in ("loss", "eval_loss", "norm"):
            assert left.get(name, 0) == pytest.approx(right.get(name, 0), rel=1e-4)


def test_an_epoch_sees_every_example_once(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path / "run", steps=7, batch_size=1, accumulate=1, eval_share=0)
    labels = [line["labels"] for line in log_of(tmp_path / "run")]
    train(home, tmp_path / "whole", steps=1, batch_size=7, accumulate=1, eval_share=0)
    assert sum(labels) == log_of(tmp_path / "whole")[0]["labels"]
    assert len(labels) == 7, "nothing is held out"


def test_divergence_is_named_and_not_saved(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match=r"diverged at step \d+: the loss is .* Lower the learning rate"):
        train(home, tmp_path / "run", learning_rate=1e30, warmup=0, save_every=100, clip=0.0)
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run" / "states").iterdir())


def test_a_codec_of_another_model(home: Path, tmp_path: Path) -> None:
    codec = make_codec(tmp_path / "codec", n_codebooks=8)
    with pytest.raises(
        CheckpointError, match="the codec has 8 codebooks of 1024 codes, and the model speaks 9 channels"
    ):
        train(home, tmp_path / "run", codec=codec)
    assert not (tmp_path / "run").exists()


def test_a_codec_beside_the_model_goes_where_the_result_goes(home: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(home / "model", begun)
    shutil.copytree(home / "codec", begun / "codec")
    model = train(home, tmp_path / "run", model=begun, codec="auto", steps=2)
    assert tree(model / "codec") == tree(home / "codec")
    assert Dia.from_pretrained(model).codec.sample_rate == 44_100

    shutil.rmtree(model / "codec")  # killed in between: the next call brings it
    finetune(tmp_path / "run", {}, resume=True, device="cpu", cache=home / "codes")
    assert tree(model / "codec") == tree(home / "codec")
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"drop_text": 1.0}, "drop_text must be at least 0 and below 1, got 1.0"),
        ({"drop_codes": -0.1}, "drop_codes must be at least 0 and below 1, got -0.1"),
        ({"weight_decay": -1}, "weight_decay must be at least 0 and at most 1, got -1"),
        ({"clip": -1}, "clip must be at least 0, got -1"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; training computes in float32 or bfloat16"),
        ({"lora_targets": ["q"]}, r"lora_targets: \['q'\]; choose from qkv, o, cross_q"),
        ({"lora_targets": []}, "lora_targets: none; choose from"),
        ({"channel_weights": [0.0] * 9}, "channel_weights must be numbers of at least 0, not all 0"),
        ({"channel_weights": [1.0]}, "channel_weights has 1 numbers; the model has 9 channels"),
    ],
)
def test_options_that_cannot_work(home: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(home, tmp_path / "run", **options)
    assert not tree(tmp_path)


def test_the_command_line(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    command = [
        "train", str(home / "data"), "--model", str(home / "model"), "--codec", str(home / "codec"), "-o", str(output),
        "--steps", "4", "--batch-size", "2", "--eval-every", "2", "--lora-rank", "2", "--lora-targets", "qkv,o",
        "--channel-weights", "2,1,1,1,1,1,1,1,1", "--codes", str(tmp_path / "codes"), "--device", "cpu",
        "--dtype", "bf16",
    ]  # fmt: skip
    assert main(command) == 0
    said = capfd.readouterr()
    assert said.out.startswith(f"{output / 'model'}: loss ") and f"--model {output / 'model'}" in said.out
    assert said.err.count("step ") == 3 and "step 4 of 4: loss " in said.err and "held out" in said.err
    stored = json.loads((output / "run.json").read_text())["options"]
    assert stored["lora_targets"] == ["qkv", "o"] and stored["dtype"] == "bfloat16"
    assert stored["channel_weights"] == [2] + [1] * 8
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == 2
    assert "holds a run already, saved at step 4: go on with it by --resume" in capfd.readouterr().err
    assert main(["train", "-o", str(output), "--resume"]) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--model", "m"], "no data: name a folder of audio and texts"),
        (["data"], "no model to begin with: name one with --model"),
        (["nowhere", "--model", "model"], "nowhere: no such file or folder; training needs a folder"),
        (["data", "--model", "nowhere"], "nowhere: no such file or folder, and not the id of a Hub repository"),
        (["--resume"], "run holds no run to resume"),
        (["data", "--model", "model", "--backend", "cuda"], "backend: 'cuda' is unknown"),
    ],
)
def test_commands_that_cannot_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    command: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(home)
    options = ["-o", str(tmp_path / "run"), "--codec", "codec", "--codes", "codes", "--device", "cpu"]
    assert main(["train", *command, *options]) == 2
    said = capfd.readouterr().err
    *remarks, error = said.splitlines()
    assert message in error and all(remark.startswith("dia-fast: warning: ") for remark in remarks)
    assert not tree(tmp_path)


def test_the_picture_is_optional(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    train(home, tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "loss.png").exists()
    assert len(log_of(tmp_path / "run")) == 3


def test_the_tiny_model_is_the_one_trained(home: Path) -> None:
    assert open_checkpoint(home / "model").config == TINY
