"""Streams: the chunks are the sound of one call, they come as early as they can, and nothing is left when they end."""

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_fast import Audio, Dia, InputError, TextWarning
from dia_fast.audio.codec import Codec, CodecConfig, random_codec
from dia_fast.audio.codec.incremental import IncrementalDecoder
from dia_fast.audio.codec.stage import CodecStream
from dia_fast.engine import Cancelled, Request, StepFailed
from dia_fast.generation.streaming import Chunks, Joiner
from dia_fast.model.model import DiaModel
from dia_fast.text.segmentation import join_segments
from tests.helpers.codecs import assert_same_sound
from tests.helpers.front import TEXT, make_dia

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")

CONTEXT = 10  # frames on either side that the codec needs
DELAY = 15
LONG = 8  # seeds: a run that ends by itself after 72 frames,
SHORT = 7  # and one after 14, less than a chunk needs
FRAME = 512 / 44_100  # seconds


@pytest.fixture(scope="module")
def dia(tmp_path_factory: pytest.TempPathFactory) -> Dia:
    return make_dia(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def exact() -> Codec:
    """Two ways to the same float64 number end in the same float32, or the next."""
    return random_codec(CodecConfig(encoder_hidden_size=4, decoder_hidden_size=32), dtype=torch.float64)


@pytest.fixture
def decoded(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The codes of every piece that the codec decodes from now on."""
    calls: list[Tensor] = []
    real = IncrementalDecoder.step

    def step(self: IncrementalDecoder, *inputs: Tensor, inside: bool) -> Tensor:
        calls.append(inputs[3][0])
        return real(self, *inputs, inside=inside)

    monkeypatch.setattr(IncrementalDecoder, "step", step)
    return calls


def joined(chunks: Iterator[Audio] | list[Audio]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(chunk.samples for chunk in chunks)])


def whole(dia: Dia, **chosen: Any) -> np.ndarray:
    audio = dia.generate(TEXT, **chosen)
    assert isinstance(audio, Audio)
    return audio.samples


def assert_nothing_left(dia: Dia) -> None:
    stats = dia.engine.stats
    assert (stats.waiting, stats.running, stats.swapped, stats.pages, stats.text_pages) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("prompted", [False, True], ids=["", "prompt"])
@pytest.mark.parametrize("seed", [SHORT, LONG])
def test_the_chunks_joined_are_the_sound_of_one_call(dia: Dia, seed: int, prompted: bool) -> None:
    chosen: dict[str, Any] = {"seed": seed, "max_new_tokens": 90}
    if prompted:
        chosen["audio_prompt"] = torch.randint(0, 1024, (40, 9))
    expected = whole(dia, **chosen)
    for seconds in (3 * FRAME, 0.1, 0.5, 1e9):
        chunks = list(dia.stream(TEXT, chunk_seconds=seconds, **chosen))
        assert_same_sound(joined(chunks), expected, dia.codec)
        first, size = (max(1, round(item / FRAME)) for item in (min(0.1, seconds), seconds))
        lengths = [len(chunk.samples) // 512 for chunk in chunks]
        assert lengths[0] == first or len(chunks) == 1
        assert all(length == size for length in lengths[1:-1]) and lengths[-1] <= size
        assert {(chunk.sample_rate, chunk.seed) for chunk in chunks} == {(44_100, seed)}
    assert_nothing_left(dia)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 8), st.integers(0, 60)), min_size=1, max_size=6),
    fade=st.integers(0, 9),
    data=st.data(),
)
def test_segments_joined_bit_by_bit_are_those_joined_at_once(lengths: list[int], fade: int, data: Any) -> None:
    pieces = [np.random.default_rng(count).standard_normal(count).astype(np.float32) for count in lengths]
    join, made = Joiner(fade), []
    for piece in pieces:
        start = 0
        while start < len(piece):
            stop = min(len(piece), start + data.draw(st.integers(1, 20)))
            made.append(join.add(piece[start:stop]))
            start = stop
            held = sum(map(len, pieces)) - sum(map(len, made))
            assert held >= 0
        made.append(join.end())
    made.append(join.close())
    expected = join_segments(pieces, 1, fade_seconds=fade)
    assert np.array_equal(np.concatenate(made), expected)


RIVER = "So we walked down to the river and looked at the water. " * 5
SCRIPT = f"[S1] {RIVER}[S2] Yes. " + "That was so long ago. " * 9
PROMPT = torch.zeros(30, 9, dtype=torch.int64)
READINGS: list[dict[str, Any]] = [{}, {"audio_prompt": PROMPT, "prompt_text": "[S1] A."}]


@pytest.mark.parametrize("voice", READINGS, ids=["", "voice"])
def test_a_long_script_streams(dia: Dia, voice: dict[str, Any]) -> None:
    chosen: dict[str, Any] = {"seed": 3, "max_new_tokens": 50, "split": "auto", **voice}
    expected = dia.generate(SCRIPT, **chosen)
    chunks = dia.stream(SCRIPT, chunk_seconds=0.2, **chosen)
    assert_same_sound(joined(chunks), expected.samples, dia.codec)
    assert chunks.outcome == expected.outcome and len(expected.outcome.segments) > 2

    async def listen() -> list[Audio]:
        return [chunk async for chunk in dia.astream(SCRIPT, chunk_seconds=0.2, **chosen)]

    assert_same_sound(joined(asyncio.run(listen())), expected.samples, dia.codec)
    with closing(dia.stream(SCRIPT, **chosen)) as given_up:
        next(given_up)
    assert_nothing_left(dia)


class Growing:
    """Stands for a handle whose frames become complete when the test says so."""

    def __init__(self, frames: Tensor) -> None:
        self.frames, self.count, self.status = frames, 0, "running"

    @property
    def done(self) -> bool:
        return self.status != "running"

    def has(self, frames: int) -> bool:
        return frames <= self.count

    def want(self, frames: int | None) -> None:
        assert frames is not None and frames > self.count - 1

    def ready(self) -> Tensor:
        return self.frames[: self.count]


@settings(max_examples=30)
@given(frames=st.integers(0, 60), size=st.integers(1, 70), data=st.data())
def test_however_frames_arrive_and_chunks_are_cut(exact: Codec, frames: int, size: int, data: st.DataObject) -> None:
    codes = torch.randint(0, 1024, (frames, 9))
    expected = exact.decode(codes).numpy()
    handle: Any = Growing(codes)
    chunks, made = Chunks(exact, size * FRAME), []
    while handle.status != "done":
        handle.count = min(frames, handle.count + data.draw(st.integers(1, 30)))
        if handle.count == frames and not data.draw(st.booleans(), "more to come"):
            handle.status = "done"
        while span := chunks.cut(handle):
            assert handle.status == "done" or len(span[0]) >= span[2] + CONTEXT
            made += chunks.decode(span, 1)
    assert np.abs(joined(made) - expected).max(initial=0) <= 2**-24
    assert [len(chunk.samples) for chunk in made] == [
        512 * (min(start + size, frames) - start) for start in range(0, frames, size)
    ]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_what_breaks_off_has_no_last_chunk(exact: Codec, status: str) -> None:
    """The frames after its last whole chunk have not all they depend on."""
    handle: Any = Growing(torch.zeros(30, 9, dtype=torch.int64))
    handle.count, handle.status = 18, status
    chunks = Chunks(exact, 5 * FRAME)
    assert [span[1:] for span in iter(lambda: chunks.cut(handle), None)] == [(0, 5)]


def test_the_codes_are_those_of_generate_and_each_is_decoded_once(dia: Dia, decoded: list[Tensor]) -> None:
    [codes] = dia.generate_codes(TEXT, seed=LONG)
    list(dia.stream(TEXT, seed=LONG, chunk_seconds=10 * FRAME, first_chunk_seconds=1))
    assert len(codes) == 72 and [len(piece) for piece in decoded] == [10 + CONTEXT, *[10] * 6, 2]
    assert torch.equal(torch.cat(decoded)[: len(codes)], codes)


@pytest.mark.parametrize("size", [1, 12])
def test_a_chunk_comes_as_soon_as_it_is_certain(dia: Dia, size: int) -> None:
    before = dia.engine.steps
    with closing(dia.stream(TEXT, seed=LONG, chunk_seconds=size * FRAME, first_chunk_seconds=1)) as chunks:
        assert dia.engine.steps == before, "nothing is done before the first chunk is asked for"
        for number in (1, 2, 3):
            next(chunks)
            # A row is complete after the step that follows it, and row 0 comes before the first frame.
            assert dia.engine.steps - before == number * size + CONTEXT + DELAY + 1


def test_progress_counts_steps(dia: Dia, capfd: pytest.CaptureFixture[str]) -> None:
    list(dia.stream(TEXT, seed=LONG, max_new_tokens=30, progress=True))
    assert "x realtime" in capfd.readouterr().err
    seen: list[int] = []
    list(dia.stream(TEXT, seed=LONG, max_new_tokens=30, progress=seen.append))
    assert seen == list(range(1, 32))


def test_every_setting_reaches_the_engine(dia: Dia) -> None:
    changes: list[dict[str, Any]] = [{"guidance_scale": None}, {"temperature": 0.5}, {"top_p": 0.3}, {"top_k": 3}]
    for change in [*changes, {"do_sample": False}]:
        chosen = {"seed": LONG, "max_new_tokens": 30, **change}
        np.testing.assert_array_equal(joined(dia.stream(TEXT, **chosen)), whole(dia, **chosen))


def leave(chunks: Iterator[Audio]) -> None:
    for _ in chunks:
        break


def close(chunks: Any) -> None:
    next(chunks)
    chunks.close()


def fail(chunks: Iterator[Audio]) -> None:
    with suppress(ZeroDivisionError):
        for _ in chunks:
            raise ZeroDivisionError


def interrupt(chunks: Iterator[Audio]) -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in chunks:
            raise KeyboardInterrupt


def never_begin(chunks: Any) -> None:
    chunks.close()


@pytest.mark.parametrize("end", [leave, close, fail, interrupt, never_begin])
def test_a_stream_that_is_left_early_leaves_nothing(dia: Dia, end: Callable[[Iterator[Audio]], None]) -> None:
    before = dia.engine.steps
    end(dia.stream(TEXT, seed=LONG, chunk_seconds=FRAME))
    assert_nothing_left(dia)
    assert dia.engine.steps - before < 30


def test_ctrl_c_in_a_step_comes_through_and_the_next_call_works(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    chunks = dia.stream(TEXT, seed=LONG, chunk_seconds=FRAME)
    first = next(chunks)
    with monkeypatch.context() as patch:
        patch.setattr(DiaModel, "decode_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
    assert_nothing_left(dia)
    again = next(dia.stream(TEXT, seed=LONG, chunk_seconds=FRAME))
    np.testing.assert_array_equal(first.samples, again.samples)


def test_a_failed_step_ends_the_stream_without_a_last_chunk(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ArithmeticError("planted")

    chunks = dia.stream(TEXT, seed=LONG, chunk_seconds=FRAME)
    next(chunks)
    monkeypatch.setattr(DiaModel, "decode_step", broken)
    with pytest.raises(StepFailed, match="planted"):
        next(chunks)
    assert_nothing_left(dia)


def test_a_codec_that_fails_in_one_stream_leaves_the_other_alone(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(dia, seed=LONG)
    chunks = dia.stream(TEXT, seed=LONG, chunk_seconds=0.2)
    made = [next(chunks)]
    other = dia.stream(TEXT, seed=8, chunk_seconds=FRAME)
    next(other)

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("planted")

    with monkeypatch.context() as broken_codec:
        broken_codec.setattr(CodecStream, "decode_span", broken)
        with pytest.raises(RuntimeError, match="planted"):
            next(other)
    assert dia.engine.stats.running == 1
    assert_same_sound(joined([*made, *chunks]), expected, dia.codec)
    assert_nothing_left(dia)


def test_streams_in_threads_share_a_batch(dia: Dia) -> None:
    seeds = range(8)
    alone = [whole(dia, seed=seed, max_new_tokens=60) for seed in seeds]
    before = dia.engine.steps
    results: dict[int, np.ndarray] = {}
    all_there = threading.Barrier(len(seeds))

    def listen(seed: int) -> None:
        all_there.wait()
        results[seed] = joined(dia.stream(TEXT, seed=seed, max_new_tokens=60, chunk_seconds=0.1))

    threads = [threading.Thread(target=listen, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        assert_same_sound(results[seed], alone[seed], dia.codec)
    together, one_by_one = dia.engine.steps - before, sum(len(samples) // 512 + 17 for samples in alone)
    assert together < one_by_one / 2
    assert_nothing_left(dia)


def test_closing_the_dia_ends_a_stream_and_it_can_be_used_again(tmp_path: Path) -> None:
    with make_dia(tmp_path) as dia:
        engine, chunks = dia.engine, dia.stream(TEXT, seed=LONG, chunk_seconds=FRAME)
        first = next(chunks)
    assert engine.stats.running == engine.stats.pages == 0
    with pytest.raises(Cancelled):
        next(chunks)
    again = next(dia.stream(TEXT, seed=LONG, chunk_seconds=FRAME))
    np.testing.assert_array_equal(first.samples, again.samples)
    assert dia.engine is not engine


def test_warnings_blame_the_caller(dia: Dia) -> None:
    with pytest.warns(TextWarning) as record:
        for _ in dia.stream("No tag.", seed=0, max_new_tokens=17):
            pass
    sentences = [str(item.message) for item in record]
    assert any("begin with [S1]" in sentence for sentence in sentences)
    assert "speech was cut after 17 steps, by max_new_tokens" in sentences
    assert {item.filename for item in record} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(dia.stream(TEXT, seed=SHORT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_seconds": 0}, "chunk_seconds must be a number above 0, such as 0.5, not 0"),
        ({"chunk_seconds": float("nan")}, "not nan"),
        ({"chunk_seconds": float("inf")}, "not inf"),
        ({"chunk_seconds": True}, "not True"),
        ({"chunk_seconds": "0.5"}, "not '0.5'"),
        ({"text": [TEXT]}, "a stream speaks one text"),
        ({"text": ""}, "text is empty"),
        ({"max_new_tokens": 16}, "at least 17"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 texts"),
        ({"audio_prompt": [None]}, "audio_prompt is a list"),
        ({"audio_prompt": "no such file"}, "no such recording"),
        ({"progress": 1}, "progress must be"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(dia: Dia, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dia.stream(**{"text": TEXT} | arguments)
    assert_nothing_left(dia)


def test_handles_know_what_they_have(dia: Dia) -> None:
    """`has` is cheap, and right: also where EOS has cut off what the rows alone would promise."""
    handle = dia.engine.submit(Request(list(TEXT.encode()), seed=SHORT), stream=True)
    while not handle.done:
        count = len(handle.ready())
        assert (handle.has(count) or not count) and not handle.has(count + 1)
        dia.engine.advance()
    assert handle.has(len(handle.result().frames)) and not handle.has(len(handle.result().frames) + 1)
