"""The codec itself: lengths, exact decoding in pieces, what it refuses, and the random one."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_fast.audio.codec import Codec, CodecConfig, random_codec
from dia_fast.audio.codec.network import DacNetwork
from dia_fast.errors import InputError
from tests.helpers.codecs import SMALL, assert_same_sound, exact_ops, ops_with, random_codes, rounding_of

ratio_lists = st.lists(st.integers(2, 6), min_size=1, max_size=3).map(tuple)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return random_codec(SMALL)


def test_the_figures_of_the_44_khz_codec() -> None:
    config = CodecConfig()
    assert (config.hop_length, config.hidden_size, config.upsampling_ratios) == (512, 1024, (8, 8, 4, 2))
    assert config.decode_context_frames == 10
    assert config.samples_of(7) == 7 * 512


@pytest.mark.parametrize("count", [1, 7, 8, 9, 800, 801])
def test_frames_cover_the_samples(codec: Codec, count: int) -> None:
    codes = codec.encode(torch.randn(count))
    assert codes.shape == (-(-count // 8), 3)
    assert codes.dtype == torch.int64
    assert codec.decode(codes).shape == (8 * len(codes),)
    assert codec.decode(codes).dtype == torch.float32


def test_the_end_is_padded_with_silence(codec: Codec) -> None:
    samples = torch.randn(77)
    padded = torch.cat([samples, torch.zeros(3)])
    assert torch.equal(codec.encode(samples), codec.encode(padded))


@pytest.mark.parametrize("make", [lambda x: x.numpy(), lambda x: x.numpy().astype(np.float64), lambda x: x.double()])
def test_arrays_and_other_precisions(codec: Codec, make: object) -> None:
    samples = torch.randn(100)
    assert torch.equal(codec.encode(make(samples)), codec.encode(samples))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(codec: Codec, dtype: torch.dtype) -> None:
    half = random_codec(SMALL, dtype=dtype)
    codes = random_codes(30)
    whole, rough = codec.decode(codes), half.decode(codes)
    assert rough.dtype == torch.float32
    assert_same_sound(rough, whole, half)  # weights and layers rounded
    samples = torch.randn(100)
    assert torch.equal(half.encode(samples), codec.encode(samples))  # a recording has the same codes


def test_the_error_of_half_precision_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Operands and weights are each rounded to 11 bits: together not far more than rounding the weights alone."""
    codes = random_codes(400)
    wide, half = random_codec(SMALL), random_codec(SMALL, dtype=torch.float16)
    rounded = random_codec(SMALL)
    for parameter in rounded.network.decoder.parameters():
        parameter.copy_(parameter.half())
    exact = wide.decode(codes).double()
    brief = random_codec(SMALL, dtype=torch.bfloat16)
    errors = {
        name: float((codec.decode(codes) - exact).norm())
        for name, codec in (("half", half), ("weights", rounded), ("bfloat16", brief))
    }
    decibels = {name: -20 * math.log10(error / float(exact.norm())) for name, error in errors.items()}
    with capsys.disabled():
        print("\nbelow the signal, dB:", {name: round(value, 1) for name, value in decibels.items()})
    assert 0 < errors["half"] <= 3 * errors["weights"]
    assert errors["bfloat16"] >= 4 * errors["half"]  # 3 bits fewer: why it is not offered


def test_no_frames_are_no_sound(codec: Codec) -> None:
    assert codec.decode(random_codes(0)).shape == (0,)


@settings(max_examples=30)
@given(ratios=ratio_lists)
def test_context_is_what_an_impulse_reaches(ratios: tuple[int, ...]) -> None:
    """With all weights 1 and activations left out, an output is not 0 exactly where it depends on the impulse."""
    config = CodecConfig(encoder_hidden_size=1, downsampling_ratios=ratios, decoder_hidden_size=2 ** len(ratios))

    decoder = DacNetwork(config, ops_with(lambda x, alpha: x)).decoder.requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    context = config.decode_context_frames
    frames, at = 4 * context + 3, 2 * context + 1
    impulse = torch.zeros(1, config.hidden_size, frames)
    impulse[:, :, at] = 1
    reached = decoder(impulse)[0, 0].nonzero().squeeze(1) // config.hop_length
    assert max(at - int(reached.min()), int(reached.max()) - at) == context
    assert decoder(impulse).shape[-1] == config.samples_of(frames)


def assert_pieces_joined_are_the_whole(codec: Codec, frames: int, cuts: list[int]) -> None:
    codes = random_codes(frames, codec.config)
    whole = codec.decode(codes)
    joined = torch.cat([codec.decode_span(codes, a, b) for a, b in zip([0, *cuts], [*cuts, frames], strict=True)])
    assert joined.shape == whole.shape
    assert (joined - whole).abs().max() <= 1e-12  # float64: what exceeds this is missing context, not rounding


@settings(max_examples=20)
@given(data=st.data(), ratios=ratio_lists)
def test_pieces_joined_are_the_whole(data: st.DataObject, ratios: tuple[int, ...]) -> None:
    width = 4 * 2 ** len(ratios)
    config = CodecConfig(encoder_hidden_size=2, downsampling_ratios=ratios, decoder_hidden_size=width, n_codebooks=2)
    frames = data.draw(st.integers(1, 4 * config.decode_context_frames), "frames")
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=4), "cuts"))
    assert_pieces_joined_are_the_whole(random_codec(config, dtype=torch.float64, ops=exact_ops()), frames, cuts)


@pytest.mark.parametrize("step", [1, 7, 30])
def test_pieces_at_the_ratios_of_the_44_khz_codec(step: int) -> None:
    config = CodecConfig(encoder_hidden_size=2, decoder_hidden_size=64)
    codec = random_codec(config, dtype=torch.float64, ops=exact_ops())
    assert_pieces_joined_are_the_whole(codec, 40, list(range(step, 40, step)))


def test_pieces_at_full_size() -> None:
    """In float32, where the order of sums may depend on length, pieces are as near to the exact sound as the whole."""
    codec, exact = random_codec(CodecConfig()), random_codec(CodecConfig(), dtype=torch.float64, ops=exact_ops())
    codes, cuts = random_codes(33, codec.config), [0, 9, 18, 27, 33]  # chunks of 0.1 s
    truth = exact.network.decode(codes.T[None])[0, 0]
    error = (codec.decode(codes) - truth).abs().max()
    joined = torch.cat([codec.decode_span(codes, start, stop) for start, stop in itertools.pairwise(cuts)])
    assert (joined - truth).abs().max() <= 2 * error
    assert error <= 2**-16, "more than half a step of 16-bit sound"


def test_the_context_is_needed(codec: Codec) -> None:
    codes = random_codes(100)
    other = codes.clone()
    other[50 + 1 + codec.decode_context_frames :] = random_codes(50 - 1 - codec.decode_context_frames)
    last = codec.decode_span(codes, 50, 51)
    assert torch.equal(last, codec.decode_span(other, 50, 51))
    short = codec.decode(codes[: 51 + 5])[-6 * codec.hop_length : -5 * codec.hop_length]
    assert (short - last).abs().max() > 4 * rounding_of(codec)


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (0, 11)])
def test_spans_outside_the_codes(codec: Codec, span: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="not a span of the 10 frames"):
        codec.decode_span(random_codes(10), *span)


@pytest.mark.parametrize("code", [-1, 32, 1024, 2**40])
def test_ids_outside_the_codebook(codec: Codec, code: int) -> None:
    codes = random_codes(10)
    codes[4, 2] = code
    with pytest.raises(InputError, match=rf"{code} at frame 4, channel 2 is outside 0\.\.31"):
        codec.decode(codes)


@given(frame=st.integers(0, 9), channel=st.integers(0, 2), code=st.integers(-(2**63), 2**63 - 1))
def test_every_id_decodes_or_is_refused(codec: Codec, frame: int, channel: int, code: int) -> None:
    codes = random_codes(10)
    codes[frame, channel] = code
    if 0 <= code < 32:
        assert codec.decode(codes).isfinite().all()
    else:
        with pytest.raises(InputError, match=f"{code} at frame {frame}, channel {channel}"):
            codec.decode(codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4, 3), "got torch.float32"),
        (torch.zeros(4, 3, dtype=torch.bool), "got torch.bool"),
        ([[1, 2, 3]], "got list"),
        (torch.zeros(4, 9, dtype=torch.int64), r"shape \[frames, 3\], got \[4, 9\]"),
        (torch.zeros(3, dtype=torch.int64), r"got \[3\]"),
        (torch.zeros(1, 3, 4, dtype=torch.int64), r"got \[1, 3, 4\]"),
    ],
)
def test_what_are_not_codes(codec: Codec, codes: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        codec.decode(codes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(0), r"n >= 1, got \[0\]"),
        (torch.zeros(1, 100), r"mono, shape \[n\] .* got \[1, 100\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.zeros(100, dtype=torch.int16), "got torch.int16"),
        (torch.zeros(100, dtype=torch.complex64), "got torch.complex64"),
        (torch.tensor([0, 0, float("nan")]), "sample 2 is not a finite number"),
        (np.array([0, np.inf, 0], np.float32), "sample 1 is not a finite number"),
        ([0.0, 0.1], "got list"),
    ],
)
def test_what_is_not_sound(codec: Codec, samples: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        codec.encode(samples)  # type: ignore[arg-type]


def test_codes_may_be_any_integers(codec: Codec) -> None:
    codes = random_codes(10)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(codec.decode(codes.to(dtype)), codec.decode(codes))


def test_decoding_leaves_the_weights_and_codes_alone(codec: Codec) -> None:
    before = {name: tensor.clone() for name, tensor in codec.network.state_dict().items()}
    samples = torch.randn(100)
    kept = samples.clone()
    codes = codec.encode(samples)
    assert torch.equal(codec.decode(codes), codec.decode(codes))
    assert torch.equal(codes, codec.encode(samples)) and torch.equal(samples, kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in codec.network.state_dict().items())
    assert not codec.decode(codes).requires_grad
    assert torch.equal(codes, codec.encode(samples.requires_grad_()))


def test_the_random_codec_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_codec(SMALL, seed=5)
    torch.manual_seed(2)
    again, other = random_codec(SMALL, seed=5), random_codec(SMALL, seed=6)
    codes = random_codes(50)
    assert torch.equal(first.decode(codes), again.decode(codes))
    assert not torch.equal(first.decode(codes), other.decode(codes))


@pytest.mark.parametrize("ratios", [(2, 4), (2, 4, 8, 8)])
def test_the_random_codec_is_audible_and_hears(ratios: tuple[int, ...]) -> None:
    config = CodecConfig(encoder_hidden_size=4, downsampling_ratios=ratios, decoder_hidden_size=64, codebook_size=256)
    codec = random_codec(config)
    samples = codec.decode(random_codes(100, config))
    assert 0.02 < samples.std() < 0.3
    assert samples.abs().max() < 0.95
    assert all(len(column.unique()) > 10 for column in codec.encode(samples).T)


def test_the_codec_describes_itself(codec: Codec) -> None:
    assert repr(codec) == "Codec(8000 Hz, 3 x 32 codes per 8 samples, torch.float32 on cpu)"
    figures = (codec.sample_rate, codec.hop_length, codec.num_codebooks, codec.codebook_size)
    assert figures == (8_000, 8, 3, 32)
