"""Incremental decoding: pieces of any length, alone and among other streams, are the whole; and what it costs."""

import contextlib
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_fast.audio.codec import Codec, CodecConfig, random_codec
from dia_fast.audio.codec.incremental import OPEN, IncrementalDecoder
from dia_fast.audio.codec.stage import SPAN, Stage
from dia_fast.errors import InputError, NumericError
from tests.helpers.codecs import exact_ops, ops_with, random_codes, rounding_of

NARROW = CodecConfig(encoder_hidden_size=4, decoder_hidden_size=32)  # the ratios of Dia's codec
SIZES = (1, 9, 22, 43)
FULL_SCALE = 1e-6


def near(codec: Codec) -> float:
    """The distance that sums in another order may be apart: 1e-6, or more where this machine rounds more coarsely."""
    return max(FULL_SCALE, 4 * rounding_of(codec))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return random_codec(NARROW)


@pytest.fixture(scope="module")
def exact() -> Codec:
    return random_codec(NARROW, dtype=torch.float64, ops=exact_ops())


def whole(codec: Codec, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return codec.network.decode(codes.T[None])[0, 0]


def in_pieces(codec: Codec, codes: Tensor, sizes: list[int]) -> Tensor:
    """By `IncrementalDecoder` alone, in the dtype of the codec; the end is known with the last frames."""
    decoder, frames, out, fed, turn = IncrementalDecoder(codec.network, codec.config, 1), len(codes), [], 0, 0
    total = codec.config.samples_of(frames)
    while decoder.first_sample(fed) < total:
        size = sizes[turn % len(sizes)]
        piece = torch.zeros(size, codes.shape[1], dtype=torch.int64)
        piece[: max(frames - fed, 0)] = codes[fed : fed + size]
        end = frames if fed + size >= frames else OPEN
        made = decoder.step(torch.tensor([0]), torch.tensor([fed]), torch.tensor([end]), piece[None])[0]
        out.append(made[max(-decoder.first_sample(fed), 0) :])
        fed, turn = fed + size, turn + 1
    return torch.cat(out)[:total]


@pytest.mark.parametrize("size", SIZES)
def test_pieces_are_the_whole_to_the_bit(size: int) -> None:
    """With weights for which no sum is ever rounded: small whole numbers, few of them, and no Snake between."""
    codec = random_codec(NARROW, dtype=torch.float64, ops=ops_with(lambda x, alpha: x))
    generator = torch.Generator().manual_seed(5)
    for name, tensor in codec.network.state_dict().items():
        if name.endswith("weight"):
            few = torch.rand(tensor.shape, generator=generator) < 3 / tensor[0].numel()
            signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
            tensor.copy_(few * signs)
        elif name.endswith("bias"):
            tensor.copy_(torch.randint(-1, 2, tensor.shape, generator=generator))
    codec.network.decoder.conv2.weight *= 2.0**-30
    codec.network.decoder.conv2.bias *= 2.0**-10
    codes = random_codes(60, NARROW)
    expected = whole(codec, codes)
    assert 0.01 < expected.abs().max() < 1 and len(expected.unique()) > 1000
    assert torch.equal(in_pieces(codec, codes, [size]), expected)


@settings(max_examples=30)
@given(data=st.data(), ratios=st.lists(st.integers(2, 6), min_size=1, max_size=3).map(tuple))
def test_pieces_are_the_whole_whatever_the_ratios(data: st.DataObject, ratios: tuple[int, ...]) -> None:
    width = 4 * 2 ** len(ratios)
    config = CodecConfig(encoder_hidden_size=2, downsampling_ratios=ratios, decoder_hidden_size=width, n_codebooks=2)
    codec = random_codec(config, dtype=torch.float64, ops=exact_ops())
    codes = random_codes(data.draw(st.integers(1, 40), "frames"), config)
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4), "sizes")
    # In float64 what exceeds this is a wrong column, not rounding.
    assert (in_pieces(codec, codes, sizes) - whole(codec, codes)).abs().max() <= 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_pieces_of_the_narrow_codec_in_float32(codec: Codec, size: int) -> None:
    codes = random_codes(100, NARROW)
    assert (in_pieces(codec, codes, [size]) - whole(codec, codes)).abs().max() <= near(codec)


def test_pieces_at_full_size_and_what_a_stream_keeps() -> None:
    codec = random_codec(CodecConfig())
    codes = random_codes(24, codec.config)
    assert (in_pieces(codec, codes, [9]) - whole(codec, codes)).abs().max() <= FULL_SCALE
    assert IncrementalDecoder(codec.network, codec.config, 1).bytes_per_stream == 487_680  # 476 KiB


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_pieces_at_full_size(size: int) -> None:
    codec = random_codec(CodecConfig())
    codes = random_codes(60, codec.config)
    assert (in_pieces(codec, codes, [size]) - whole(codec, codes)).abs().max() <= FULL_SCALE


def listen(codec: Codec, codes: Tensor, size: int, there: Callable[[], object] = lambda: None) -> Tensor:
    """As a stream of chunks of `size` frames, each as soon as the frames that it depends on are there."""
    stream, made, start, frames = codec.stream(), [], 0, len(codes)
    while start < frames:
        stop = min(start + size, frames)
        there()
        made.append(stream.decode_span(codes[: stop + codec.decode_context_frames], start, stop))
        start = stop
    return torch.cat(made)


def together(codec: Codec, jobs: list[tuple[Tensor, int]]) -> list[Tensor]:
    """All at once, in threads."""
    out: list[Tensor] = [torch.empty(0)] * len(jobs)

    def run(index: int) -> None:
        out[index] = listen(codec, *jobs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return out


@pytest.mark.parametrize("count", [1, 5, 32])
def test_streams_that_join_and_leave_are_the_one_shot_decode(codec: Codec, count: int) -> None:
    jobs = [(random_codes(3 + 7 * index % 90, NARROW), SIZES[index % 4]) for index in range(count)]
    for (codes, size), made in zip(jobs, together(codec, jobs), strict=True):
        assert (made - codec.decode(codes)).abs().max() <= near(codec)
        assert torch.equal(made, listen(codec, codes, size)), "the company of others changed a stream"


class Graphs:
    """In place of CUDA graphs: what is captured is run again on the same buffers."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


@pytest.mark.parametrize("count", [1, 6, 40])
def test_batches_by_graphs_of_fixed_shapes(count: int) -> None:
    """Streams of one length of chunk are one batch, padded to a power of two."""
    codec, graphs = random_codec(NARROW, dtype=torch.float64, ops=exact_ops()), Graphs()
    codec.stage = Stage(codec, graphs)
    jobs = [(random_codes(40 + index, NARROW), 9) for index in range(count)]
    barrier = threading.Barrier(count)
    real = codec.stage.put

    def put(job: object) -> None:  # they come at the same time, as chunks of an engine's batch do
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(0.05)
        real(job)  # type: ignore[arg-type]

    codec.stage.put = put  # type: ignore[method-assign]
    for (codes, _), made in zip(jobs, together(codec, jobs), strict=True):
        assert (made - whole(codec, codes).float()).abs().max() <= 2**-23
    assert 1 <= graphs.captured <= 16
    assert graphs.replayed >= 1
    if count > 1:
        assert codec.stage.batches < codec.stage.computed / 9 * 0.75, "they were decoded one by one"


def test_a_frame_is_computed_once(codec: Codec) -> None:
    """Chunks of 0.1 s: what is computed beyond what is delivered is the end, 9.3 frames of silence."""
    stage = codec.stage or codec.stream()._stage
    before = stage.computed
    codes = random_codes(200, NARROW)
    listen(codec, codes, 9)
    assert 1.0 <= (stage.computed - before) / len(codes) <= 1.1


def test_what_is_kept_is_given_back(codec: Codec) -> None:
    listen(codec, random_codes(12, NARROW), 9)
    assert codec.stage is not None
    rows = codec.stage._rows
    for _ in range(50):
        listen(codec, random_codes(12, NARROW), 9)
    assert codec.stage._rows <= rows + 1


def test_a_long_sound_is_decoded_in_pieces(codec: Codec, exact: Codec) -> None:
    for frames in (SPAN, SPAN + 1, 2 * SPAN, 700):
        codes = random_codes(frames, NARROW)
        assert (codec.decode(codes) - whole(codec, codes)).abs().max() <= near(codec)
        assert (exact.decode(codes) - whole(exact, codes).float()).abs().max() <= 2**-24


@pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is read as Linux tells it")
@pytest.mark.parametrize(
    ("width", "frames", "limit"), [(192, 512, 70), pytest.param(1536, 3072, 400, marks=pytest.mark.slow)]
)
def test_the_memory_of_a_long_sound(width: int, frames: int, limit: int, tmp_path: Path) -> None:
    """MiB beside the samples, what the allocator keeps included. The first is an eighth as wide as Dia's codec."""
    root = Path(__file__).parents[2]
    sizes = ["--width", str(width), "--frames", str(frames), "--device", "cpu"]
    arguments = [sys.executable, "-m", "bench.long_sound", *sizes, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    [found] = json.loads((tmp_path / "found.json").read_text())["results"]
    assert 0 < found["values"]["beside_mib"] <= limit


def test_half_precision_streams_are_the_half_precision_whole() -> None:
    codec = random_codec(NARROW, dtype=torch.float16)
    codes = random_codes(60, NARROW)
    made, expected = listen(codec, codes, 9), whole(random_codec(NARROW), codes)
    error = (codec.decode(codes) - expected).abs().max()
    assert (made - expected).abs().max() <= 4 * rounding_of(codec)
    narrow = codec.network.decoder(codec.network.quantizer.decode(codes.T[None]).half())  # all of it in float16
    assert error <= (narrow[0, 0].float() - expected).abs().max()


def test_the_codebooks_table_is_there_before_any_thread_decodes() -> None:
    codec = random_codec(NARROW)
    made = codec.network.quantizer._table_of
    codec.decode(random_codes(5, NARROW))
    listen(codec, random_codes(5, NARROW), 5)
    assert made is not None and codec.network.quantizer._table_of is made


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (6, 7), (5, 4), (5, 61)])
def test_spans_come_in_their_order(codec: Codec, start: int, stop: int) -> None:
    codes, stream = random_codes(60, NARROW), codec.stream()
    first = stream.decode_span(codes, 0, 5)
    with pytest.raises(InputError, match="are not the next span of this stream, which has sent 5"):
        stream.decode_span(codes, start, stop)
    rest = stream.decode_span(codes, 5, 60)
    assert (torch.cat([first, rest]) - codec.decode(codes)).abs().max() <= near(codec)


def test_codes_after_the_end_are_refused(codec: Codec) -> None:
    codes, stream = random_codes(60, NARROW), codec.stream()
    stream.decode_span(codes[:20], 0, 15)
    with pytest.raises(InputError, match="not the next span"):
        stream.decode_span(codes, 15, 30)


def test_what_breaks_one_stream_leaves_the_others(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(40, NARROW)
    good, bad = codec.stream(), codec.stream()
    made = [good.decode_span(codes, 0, 9)]
    real = IncrementalDecoder.step
    with monkeypatch.context() as broken:
        broken.setattr(IncrementalDecoder, "step", lambda *args, **named: real(*args, **named) * float("nan"))
        with pytest.raises(NumericError, match="NaN or infinity"):
            bad.decode_span(codes, 0, 9)
        broken.setattr(IncrementalDecoder, "step", lambda *args, **named: 1 / 0)
        other = codec.stream()
        with pytest.raises(ZeroDivisionError):
            other.decode_span(codes, 0, 9)
    for stream in (bad, other):
        with pytest.raises((NumericError, ZeroDivisionError)):
            stream.decode_span(codes, 0, 9)
    made.append(good.decode_span(codes, 9, 40))
    assert (torch.cat(made) - codec.decode(codes)).abs().max() <= near(codec)


def test_its_thread_ends_with_the_codec() -> None:
    codec = random_codec(NARROW)
    listen(codec, random_codes(12, NARROW), 9)
    assert codec.stage is not None
    thread = codec.stage._thread
    del codec
    gc.collect()
    assert thread is not None
    thread.join(20)
    assert not thread.is_alive()


def test_the_weights_may_change(codec: Codec) -> None:
    """The table of what each code adds follows them."""
    changed = random_codec(NARROW)
    codes = random_codes(12, NARROW)
    before = changed.decode(codes)
    with torch.no_grad():
        changed.network.quantizer.quantizers[2].out_proj.bias.mul_(-30)
    assert not torch.equal(changed.decode(codes), before)
