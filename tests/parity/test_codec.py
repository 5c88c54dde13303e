"""The native codec against transformers' DacModel and the `dac` package, with random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tools.codec_files import save_official
from dia_fast.audio.codec import Codec, CodecConfig, load_codec, random_codec
from tests.helpers.codecs import assert_same_sound, imported_dac

# The 44.1 kHz codec of Dia at its full size, and one with odd and reordered ratios, where lengths are uneven.
FULL = CodecConfig()
ODD = CodecConfig(
    encoder_hidden_size=8, downsampling_ratios=(2, 3, 5), decoder_hidden_size=32, upsampling_ratios=(3, 5, 2)
)
FRAMES = 12

# The dac package uses the old spelling of weight norm.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module", params=[FULL, ODD], ids=["44khz", "odd"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return random_codec(request.param)


@pytest.fixture(scope="module")
def codes(codec: Codec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, codec.codebook_size, (FRAMES, codec.num_codebooks), generator=generator)


@pytest.fixture(scope="module")
def decoded(codec: Codec, codes: torch.Tensor) -> torch.Tensor:
    return codec.decode(codes)


@pytest.fixture(scope="module")
def samples(codec: Codec) -> torch.Tensor:
    """Noise and a tone, not a whole number of frames long."""
    count = FRAMES * codec.hop_length - 7
    noise = torch.randn(count, generator=torch.Generator().manual_seed(2))
    return 0.3 * torch.sin(torch.arange(count) / 20) + 0.1 * noise


@pytest.fixture
def dac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from imported_dac(monkeypatch)


def check(found: torch.Tensor, expected: torch.Tensor, codec: Codec) -> None:
    """Waveforms equal but for rounding, and not for want of a signal."""
    assert expected.std() > 0.03
    assert_same_sound(found, expected, codec)


@torch.no_grad()
def test_transformers(
    codec: Codec, codes: torch.Tensor, decoded: torch.Tensor, samples: torch.Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    codec.save_pretrained(tmp_path)
    model, report = transformers.DacModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    inputs = extractor(samples.numpy(), sampling_rate=codec.sample_rate, return_tensors="pt")

    expected = model.encode(inputs["input_values"]).audio_codes[0].T
    found = codec.encode(samples)
    assert len(found.unique()) > 50
    assert torch.equal(found, expected)
    check(decoded, model.decode(audio_codes=codes.T[None]).audio_values[0], codec)


def test_files_that_transformers_wrote(
    codec: Codec, codes: torch.Tensor, decoded: torch.Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    codec.save_pretrained(tmp_path / "ours")
    transformers.DacModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = load_codec(tmp_path / "theirs")
    assert loaded.config == codec.config
    assert torch.equal(loaded.decode(codes[:3]), codec.decode(codes[:3]))


@torch.no_grad()
def test_descript_audio_codec(
    codec: Codec, codes: torch.Tensor, decoded: torch.Tensor, samples: torch.Tensor, tmp_path: Path, dac: Any
) -> None:
    """One official file, opened by the native codec and, as `codec="descript"`, by `dac`."""
    path = save_official(codec, tmp_path / "weights.pth", "old")
    native, through = load_codec(path), load_codec(f"descript:{path}")
    model = through.network.model
    assert type(model) is dac.DAC

    padded = model.preprocess(samples[None, None], codec.sample_rate)
    expected = model.encode(padded)[1][0].T
    assert len(expected.unique()) > 50
    assert torch.equal(native.encode(samples), expected)
    wave = model.decode(model.quantizer.from_codes(codes.T[None])[0])[0, 0]
    check(native.decode(codes), wave, codec)
    check(decoded, wave, codec)

    assert through.config == codec.config
    assert torch.equal(through.encode(samples), expected)
    assert torch.equal(through.decode(codes), wave)
