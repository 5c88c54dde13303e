"""The dtype that sound is computed in, chosen where a model is loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_fast import Dia, InputError
from dia_fast.audio.codec import load_codec
from dia_fast.cli import main
from dia_fast.generation import inputs
from tests.helpers.front import TEXT, make_codec, make_model

SHORT: dict[str, Any] = {"max_new_tokens": 30, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model"))
    make_codec(folder / "codec")
    return folder


def test_half_precision_speaks_as_single_precision_does(folder: Path) -> None:
    dia, half = (Dia.from_pretrained(folder, device="cpu", codec_dtype=dtype) for dtype in (None, "fp16"))
    assert (dia.codec.dtype, half.codec.dtype) == (torch.float32, torch.float16)
    exact, ours = (here.generate(TEXT, **SHORT).samples for here in (dia, half))
    assert not np.array_equal(ours, exact)
    assert np.linalg.norm(ours - exact) < 0.01 * np.linalg.norm(exact)
    streamed = np.concatenate([chunk.samples for chunk in half.stream(TEXT, **SHORT)])
    np.testing.assert_allclose(streamed, ours, rtol=0, atol=2e-3 * float(np.abs(exact).max()))
    samples = np.random.default_rng(0).normal(size=9_000).astype(np.float32) * 0.1
    assert torch.equal(half.codec.encode(samples), dia.codec.encode(samples))


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16, torch.float64, "int8", 16])
def test_what_is_not_offered(folder: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match=r"codec_dtype .* is not supported; use float32 or float16"):
        Dia.from_pretrained(folder, device="cpu", codec_dtype=dtype)


def test_a_loaded_codec_and_the_original_packages_keep_theirs(folder: Path) -> None:
    codec = load_codec(folder / "codec", dtype=torch.float16)
    assert Dia.from_pretrained(folder, device="cpu", codec=codec).codec.dtype == torch.float16
    with pytest.raises(InputError, match=r"codec_dtype is torch.float32, and the codec was loaded in torch.float16"):
        Dia.from_pretrained(folder, device="cpu", codec=codec, codec_dtype="fp32")
    with pytest.raises(InputError, match="the dac package's own codec computes in float32 alone"):
        Dia.from_pretrained(folder, device="cpu", codec="descript", codec_dtype="fp16")


def test_a_cpu_without_convolutions_in_half_precision_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*inputs: Any, **named: Any) -> None:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(inputs.functional, "conv1d", missing)
    with pytest.raises(InputError, match=r"cannot convolve in torch.float16 on cpu \(.*Half.*\); use fp32"):
        Dia.from_pretrained(folder, device="cpu", codec_dtype="fp16")


def test_the_command_line_takes_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.wav"
    told = ["speak", TEXT, "--model", str(folder), "--device", "cpu", "-o", str(output), "--max-new-tokens", "30"]
    assert main([*told, "--codec-dtype", "fp16"]) == 0 and output.exists()
    assert main([*told, "--codec-dtype", "bf16"]) == 2
    assert "--codec-dtype 'bf16' is not supported" in capsys.readouterr().err
