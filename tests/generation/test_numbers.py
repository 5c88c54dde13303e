"""Values that stop being numbers: refused where weights are read or written, told where they appear in a generation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from bench.tools.tiny_models import tiny_config
from dia_fast import Dia
from dia_fast.audio.codec import random_codec
from dia_fast.checkpoint.demo import located
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import convert, save_pretrained
from dia_fast.cli import main
from dia_fast.engine import Engine, Request, generate
from dia_fast.errors import CheckpointError, NumericError
from dia_fast.model.model import DiaModel
from tests.engine.test_engine import EOS, random_model, random_request
from tests.helpers.codecs import SMALL
from tests.helpers.front import TEXT, make_codec, make_model

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo voice, to be damaged."""
    return Path(shutil.copytree(located("demo"), tmp_path / "voice"))


def damage(folder: Path, name: str, value: float, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / file, {"format": "pt"})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["model.decoder.norm.weight", "logits_dense.weight", "model.encoder.embedding.weight"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_damaged_weights_are_refused_by_name(demo: Path, name: str, value: float, dtype: torch.dtype | None) -> None:
    damage(demo, name, value)
    with pytest.raises(CheckpointError, match=f"tensor {name} is damaged: 1 of its .* NaN or infinity"):
        open_checkpoint(demo).load(dtype)


def test_speak_refuses_a_damaged_voice(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(demo, "model.decoder.norm.weight", NAN)
    out = tmp_path / "out.wav"
    assert main(["speak", "[S1] Hello.", "--model", str(demo), "-o", str(out)]) != 0
    assert "model.decoder.norm.weight is damaged" in capsys.readouterr().err and not out.exists()


def test_converting_to_float16_refuses_what_does_not_fit(demo: Path, tmp_path: Path) -> None:
    name = "logits_dense.weight"
    tensors = {key: value.float() for key, value in load_file(demo / "model.safetensors").items()}
    tensors[name].view(-1)[:2] = torch.tensor([1e6, -2e6])
    save_file(tensors, demo / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"2 of the \d+ values of tensor {name} are too large for float16.*bfl"):
        convert(demo, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    assert convert(demo, tmp_path / "bf16", dtype=torch.bfloat16).is_dir()
    words = ["convert", str(demo), str(tmp_path / "half"), "--to", "transformers", "--dtype", "float16"]
    assert main(words) != 0 and not (tmp_path / "half").exists()


def test_saving_refuses_what_is_no_number(tmp_path: Path) -> None:
    weights = random_model().state_dict()
    weights["decoder.norm"][0] = NAN
    with pytest.raises(CheckpointError, match="weight decoder.norm cannot be written: 1 of its"):
        save_pretrained(tmp_path / "out", tiny_config(), weights)
    assert not (tmp_path / "out").exists()


def poisoned_texts(value: float) -> DiaModel:
    """A model in which one byte of text, 7, has an embedding that is no number."""
    model = random_model()
    with torch.inference_mode():
        model.encoder.embedding[7] = value
    return model


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_one_request_fails_and_the_others_go_on(value: float, temperature: float) -> None:
    model = poisoned_texts(value)
    drawn = [random_request(temperature=temperature, seed=seed) for seed in range(3)]
    good = [replace(request, text_ids=[max(8, item) for item in request.text_ids]) for request in drawn]
    expected = generate(model, good)
    bad = Request([9, 7, 9], max_new_tokens=30, temperature=temperature, seed=1)
    engine = Engine(model, max_batch=4)
    handles = [engine.submit(request) for request in (good[0], bad, *good[1:])]
    broken = handles.pop(1)
    for handle, want in zip(handles, expected, strict=True):
        assert torch.equal(handle.result().delayed_codes, want.delayed_codes)
    with pytest.raises(NumericError, match=r"step 1 \(position 1, channel 0\) are NaN or infinity.*damaged.*bfloat16"):
        broken.result()
    assert engine.stats.pages == engine.stats.text_pages == 0
    assert torch.equal(engine.submit(good[0]).result().delayed_codes, expected[0].delayed_codes), (
        "the batch row serves again"
    )


def test_a_stream_ends_with_the_error() -> None:
    handle = Engine(poisoned_texts(NAN), max_batch=1).submit(Request([7], max_new_tokens=30, seed=1), stream=True)
    with pytest.raises(NumericError, match="NaN or infinity"):
        list(handle.frames())


def test_values_that_overflow_in_float16_say_what_helps() -> None:
    weights = {name: tensor.clone() for name, tensor in random_model().state_dict().items()}
    weights["decoder.layers.0.down"] *= 1e3
    weights["decoder.layers.1.down"] *= 1e5
    half = {name: tensor.clamp(-6e4, 6e4).half() for name, tensor in weights.items()}
    model = DiaModel(random_model().config, random_model().ops).load(half)
    with pytest.raises(NumericError, match="float16 values may have grown too large: use bfloat16"):
        generate(model, [random_request(seed=1, max_new_tokens=10)])


def test_a_draw_without_candidates_is_an_error() -> None:
    model = random_model()
    plain = model.ops

    class Ops:
        def __getattr__(self, name: str) -> Any:
            return getattr(plain, name)

        def codebook_logits(self, *args: Any) -> torch.Tensor:
            logits = plain.codebook_logits(*args).zero_()
            logits[: len(logits) // 2, :, EOS + 1] = 9.0
            return logits

    model.ops = Ops()
    with pytest.raises(NumericError, match=r"no code is left to draw at step 1 .*the 1 best.*larger top_k"):
        generate(model, [Request([9], guidance_scale=3.0, top_k=1, seed=3, max_new_tokens=12)])
    greedy = generate(model, [Request([9], guidance_scale=3.0, top_k=1, temperature=0.0, max_new_tokens=12)])
    assert greedy[0].truncated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codec_that_gives_no_numbers(dtype: torch.dtype) -> None:
    codec = random_codec(SMALL, dtype=dtype)
    with torch.inference_mode():
        codec.network.decoder.conv1.bias[0] = NAN
        codec.network.encoder.conv2.bias[0] = INF
    with pytest.raises(NumericError, match="the codec's sound is NaN"):
        codec.decode(torch.zeros(3, codec.num_codebooks, dtype=torch.int64))
    with pytest.raises(NumericError, match="the codec's encoder gives NaN"):
        codec.encode(torch.zeros(2000))


def overflowing_codec(folder: Path, weight: str) -> Path:
    """A codec of finite weights, whose values grow beyond float32."""
    make_codec(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[weight].mul_(1e38).clamp_(-3e38, 3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_speak_ends_where_the_codec_gives_no_numbers(
    stream: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out.wav"
    codec = overflowing_codec(tmp_path / "codec", "decoder.conv1.weight")
    words = ["speak", TEXT, "--model", str(model), "--codec", str(codec), "--device", "cpu", "-o", str(out), *stream]
    assert main([*words, "--max-new-tokens", "40", "--seed", "1", "-q"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("dia-fast: error: the codec's sound is NaN or infinity")
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"model", "codec"}


def test_batch_tells_of_each_item_where_the_codec_gives_no_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    codec = overflowing_codec(tmp_path / "codec", "decoder.conv1.weight")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "[S1] Yes."}) + "\n")
    words = ["batch", str(tmp_path / "in.jsonl"), str(out), "--model", str(model), "--codec", str(codec), "-q"]
    assert main([*words, "--device", "cpu", "--max-new-tokens", "40"]) == 1
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [entry["status"] for entry in entries] == ["failed", "failed"]
    assert all("the codec's sound is NaN or infinity" in entry["error"] for entry in entries)
    assert not list(out.glob("*.wav"))


@pytest.mark.parametrize("place", ["samples", "encoder"])
def test_a_prompt_that_is_no_number(place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    samples = np.sin(np.arange(44_100, dtype=np.float32) / 30)
    if place == "samples":
        samples[123] = NAN
        codec = make_codec(tmp_path / "codec")
        said, status = "voice.wav: sample 123 is nan", 2
    else:
        codec = overflowing_codec(tmp_path / "codec", "encoder.conv1.weight")
        said, status = "the codec's encoder gives NaN or infinity", 1
    soundfile.write(tmp_path / "voice.wav", samples, 44_100, subtype="FLOAT")
    model, out = make_model(tmp_path / "model"), tmp_path / "out.wav"
    words = ["speak", TEXT, "--model", str(model), "--codec", str(codec), "--device", "cpu", "-o", str(out), "-q"]
    assert main([*words, "--prompt", str(tmp_path / "voice.wav"), "--prompt-text", TEXT]) == status
    assert said in capfd.readouterr().err.splitlines()[-1] and not out.exists()


@pytest.mark.parametrize("guidance", [True, False])
def test_forward_logits_says_where_they_are_no_numbers(guidance: bool) -> None:
    dia = Dia(poisoned_texts(NAN), codec=None)
    rows = torch.full((2, 3, 9), dia.config.decoder.bos_token_id)
    with pytest.raises(NumericError, match="text 1, step 0, channel 0 are NaN or infinity.*damaged"):
        dia.forward_logits(["[S1] Yes.", "a\x07b"], rows, guidance=guidance)
    dia.forward_logits(["[S1] Yes.", "[S1] No."], rows, guidance=guidance)
