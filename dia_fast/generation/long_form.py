"""Scripts on their way through an engine: which segment can go next, in which voice, and what became of it."""

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dia_fast.audio.audio import Audio, Samples
from dia_fast.engine import Engine, Generation, Handle, Request
from dia_fast.errors import InputError, shown
from dia_fast.generation.inputs import (
    FRAMES_PER_SECOND,
    Progress,
    cut_remark,
    ids_of,
    least_seconds,
    make_request,
    progress_of,
)
from dia_fast.generation.outcome import Outcome, Segment, attempt_seed, finish_reason, silence
from dia_fast.generation.prompts import Voice, longest_prompt
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.model.config import DiaConfig
from dia_fast.text.segmentation import LEAST_SECONDS, SEGMENT_SECONDS, JoinedSegments, continued, speakers, split_script
from dia_fast.text.tokenizer import (
    ABSURD_BYTES,
    GOOD_SECONDS,
    TextWarning,
    checked_text,
    encode_text,
    join_prompt,
    spoken_seconds,
    text_warnings,
)
from dia_fast.utils.ambient import isolated
from dia_fast.utils.progress import StepBar
from dia_fast.utils.warn import warn

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec

_SLACK = 1.2  # how much longer than expected a segment may turn out


def cut(
    text: str | bytes, config: DiaConfig, voice: Voice | None = None, frames_per_second: float = FRAMES_PER_SECOND
) -> list[str]:
    """The text itself, if the model takes it well in one segment (20 s, its bytes); else segments of it.

    Args:
        voice: The one that each segment is to be spoken in; without it there is room for one more segment as the voice.

    Raises:
        InputError: For a text that cannot be spoken, and for a voice that leaves no room.
    """
    text = checked_text(text)
    size = config.encoder.max_position_embeddings
    frames = longest_prompt(config)
    if voice is not None:
        frames -= len(voice.codes)
        size -= len(encode_text(voice.text, max_length=ABSURD_BYTES)) + 1 if voice.text else 0
    seconds = frames / frames_per_second / _SLACK
    longest = GOOD_SECONDS if voice is None else min(GOOD_SECONDS, seconds)
    if spoken_seconds(text) <= longest and len(encode_text(text, max_length=ABSURD_BYTES)) <= size:
        return [text]
    if voice is None:
        seconds, size = seconds / 2, (size - 1) // 2
    elif not voice.text:
        raise InputError("a script that is split needs prompt_text beside audio_prompt: what is said in the recording")
    if seconds < LEAST_SECONDS or size < 16:
        raise InputError(
            f"the audio prompt and its text leave room for {max(seconds, 0):.1f} s and {max(size, 0)} bytes: too "
            "little for a segment; use a shorter recording"
        )
    return split_script(text, max_seconds=min(SEGMENT_SECONDS, seconds), max_bytes=size)


def segment_seed(seed: int, index: int) -> int:
    """The seed of a segment: the script's for the first; for segment i the first 63 bits of SHA-256 of "seed/i"."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") & (2**63 - 1)


class Script:
    """A script being spoken, segment by segment.

    With a voice, each segment is independent: all may run at once. Without, each goes on in the voice of what was
    spoken before: the last segment, or an earlier one, or both, if the last lacks a speaker that is needed. Only whole
    segments serve as a voice, since text and sound must match: none that the length limit has cut, and none that leaves
    no room.

    Args:
        config: Of the model.
        segments: As from `cut`.
        params: For every segment; with a seed.
        name: The caller's own.
        frames_per_second: Of the codec. A silent segment is tried again, `params.retries` times, before anything goes
            on in its voice. `frames` are the codes of each segment, `remarks` what the user should hear about, `error`
            what ended it, if anything.

    Raises:
        InputError: For a text that cannot be spoken.
    """

    def __init__(
        self,
        config: DiaConfig,
        segments: Sequence[str],
        params: SamplingParams,
        voice: Voice | None = None,
        name: str = "",
        frames_per_second: float = FRAMES_PER_SECOND,
    ) -> None:
        self.frames_per_second = frames_per_second
        assert params.seed is not None
        self.config, self.segments, self.params, self.voice, self.name = config, segments, params, voice, name
        self.seed = params.seed
        self.frames: list[Tensor | None] = [None] * len(segments)
        self.truncated = [False] * len(segments)
        self.seeds: list[tuple[int, ...]] = [() for _ in segments]
        self.error: Exception | None = None
        for segment in segments:
            ids_of(config, segment)
        self.remarks = self._warnings()
        self._next = 0
        self._again: list[int] = []
        self._joined: JoinedSegments | None = None
        self._decoding: list[Future[None]] = []  # of the first segments, in their order

    @property
    def spoken(self) -> int:
        """Segments done."""
        return sum(item is not None for item in self.frames)

    @property
    def text(self) -> str:
        """Of the first segment, as the model reads it."""
        return self._in_voice(0)[1]

    @property
    def done(self) -> bool:
        return self.error is not None or self.spoken == len(self.segments)

    def next_request(self) -> tuple[int, Request] | None:
        """The next segment and its request; None if there is none, or none that can start yet."""
        if self.error is not None:
            return None
        if self._again:
            index = self._again.pop(0)
        else:
            index = self._next
            waits = self.voice is None and index > 0 and self.frames[index - 1] is None
            if index == len(self.segments) or waits:
                return None
            self._next += 1
        prompt, text = self._in_voice(index)
        ids = ids_of(self.config, text)
        seed = attempt_seed(segment_seed(self.seed, index), len(self.seeds[index]))
        self.seeds[index] += (seed,)
        return index, make_request(ids, seed, prompt, self.params)

    def take(self, index: int, spoken: Generation) -> None:
        """Keep what became of a segment, or have it tried again."""
        silent, tried = not len(spoken.frames), len(self.seeds[index])
        if silent and tried <= self.params.retries and not self.params.greedy:
            self._again.append(index)
            return
        self.frames[index], self.truncated[index] = spoken.frames, spoken.truncated
        which = f"segment {index + 1} of {len(self.segments)}: " if len(self.segments) > 1 else ""
        if silent:
            self.remarks.append(which + silence(tried))
        elif spoken.truncated:
            prompt = self._in_voice(index)[0]
            given = 0 if prompt is None else len(prompt)
            self.remarks.append(which + cut_remark(self.config, self.params.max_new_tokens, given))

    @property
    def outcome(self) -> Outcome:
        """The result of each segment, once the script is done."""
        parts = zip(self.segments, self.frames, self.truncated, self.seeds, strict=True)
        segments = []
        for text, frames, truncated, seeds in parts:
            count = 0 if frames is None else len(frames)
            segments.append(Segment(text, finish_reason(count, truncated), count, seeds))
        return Outcome(tuple(segments), tuple(self.remarks))

    def decode(self, codec: "Codec") -> None:
        """Hand the segments that are done to the codec's thread, in their order; waits for nothing."""
        if self._joined is None:
            self._joined = JoinedSegments(codec.sample_rate)
        while len(self._decoding) < len(self.frames):
            frames = self.frames[len(self._decoding)]
            if frames is None:
                return
            self._decoding.append(codec.in_thread(self._add_sound, codec, self._joined, frames))

    def _add_sound(self, codec: "Codec", joined: JoinedSegments, frames: Tensor) -> None:
        if len(frames):
            joined.add(codec.decode(frames).cpu().numpy())

    @property
    def decoded(self) -> bool:
        """Nothing of it is left that `decode` has handed to the codec."""
        return all(item.done() for item in self._decoding)

    def wait_decoded(self) -> None:
        """Wait until it is `decoded`."""
        wait(self._decoding)

    def drop_sound(self) -> None:
        """Leave undone what `decode` has handed to the codec and is not under way."""
        for item in self._decoding:
            item.cancel()

    def sound(self, codec: "Codec") -> Samples:
        """The decoded segments, joined; no samples if the model said nothing."""
        self.decode(codec)
        for item in self._decoding:
            item.result()
        assert self._joined is not None
        return self._joined.samples()

    def audio(self, codec: "Codec") -> Audio:
        """The sound, with its seed and outcome."""
        return Audio(self.sound(codec), codec.sample_rate, self.seed, self.outcome)

    @isolated()
    def codes(self) -> Tensor:
        """The codes of the segments, one after the other, `[frames, channels]` int64."""
        return torch.cat([frames for frames in self.frames if frames is not None])

    def expected_steps(self) -> int:
        """About how many steps all segments take: one after the other, or at once in a voice of their own."""
        rows = max(self.config.delay_pattern) + 2
        steps = (math.ceil(spoken_seconds(segment) * self.frames_per_second) + rows for segment in self.segments)
        counts = [min(count, self.params.max_new_tokens + 1) for count in steps]
        return max(counts) if self.voice else sum(counts)

    def _warnings(self) -> list[str]:
        if len(self.segments) > 1:
            # About tags only: the length has been dealt with, and so has a segment that begins with [S2].
            texts = [self.segments[0], *map(continued, self.segments[1:])]
            each = (text_warnings(text, max_length=ABSURD_BYTES, prompt_seconds=math.inf) for text in texts)
            found = list(dict.fromkeys(sentence for sentences in each for sentence in sentences))
            known = speakers(self.voice.text) if self.voice else set()
            missing = sorted(set[str]().union(*map(speakers, self.segments)) - known) if self.voice else []
            if missing:
                found.append(f"{missing[0]} is not heard in the audio prompt: its voice will differ between segments")
            return found
        seconds = len(self.voice.codes) / self.frames_per_second if self.voice else 0.0
        size = self.config.encoder.max_position_embeddings
        return text_warnings(
            self.text, max_length=size, prompt_seconds=seconds, least_seconds=least_seconds(self.config)
        )

    def _in_voice(self, index: int) -> tuple[Tensor | None, str]:
        """The audio prompt of a segment, and the text to read."""
        segment = self.segments[index]
        if self.voice is not None:
            if not self.voice.text:
                return self.voice.codes, segment
            alone = len(self.segments) == 1
            return self.voice.codes, join_prompt(self.voice.text, segment) if alone else continued(
                self.voice.text, segment
            )
        if index == 0:
            return None, segment
        return self._carried_on(index)

    def _carried_on(self, index: int) -> tuple[Tensor | None, str]:
        """As `_in_voice`, with what was spoken before as the voice: the choice that has most of the speakers needed."""
        needed = speakers(self.segments[index])
        latest: dict[frozenset[str], int] = {}
        for before in range(index):
            frames = self.frames[before]
            if frames is not None and len(frames) and not self.truncated[before]:
                latest[frozenset(speakers(self.segments[before]))] = before
        usable = sorted(latest.values())
        choices = [(one,) for one in reversed(usable)] + [(one, usable[-1]) for one in reversed(usable[:-1])]
        best: tuple[int, Tensor | None, str] = (0, None, continued(self.segments[index]))
        for choice in choices:
            heard = needed & set[str]().union(*(speakers(self.segments[before]) for before in choice))
            found = self._prompted(choice, index)
            if found is not None and len(heard) + 1 > best[0]:
                best = (len(heard) + 1, *found)
        if best[1] is None:
            remark = f"segment {index + 1} of {len(self.segments)} begins with a new voice: none fits before it"
            self.remarks += [] if remark in self.remarks else [remark]
        return best[1], best[2]

    @isolated()
    def _prompted(self, choice: Sequence[int], index: int) -> tuple[Tensor, str] | None:
        """Codes of earlier segments and the text with theirs in front; None if that leaves too little room."""
        codes = torch.cat([item for before in choice if (item := self.frames[before]) is not None])
        text = continued(*(self.segments[before] for before in choice), self.segments[index])
        wanted = math.ceil(spoken_seconds(self.segments[index]) * self.frames_per_second * _SLACK)
        fits = len(codes) + wanted <= longest_prompt(self.config)
        size = len(encode_text(text, max_length=ABSURD_BYTES))
        return (codes, text) if fits and size <= self.config.encoder.max_position_embeddings else None


def speak_all(
    engine: Engine,
    scripts: Iterable[Script],
    at_once: int,
    stepped: Callable[[], None] | None = None,
    codec: "Codec | None" = None,
) -> Generator[Script, None, None]:
    """Speak scripts, and yield each when it is done or has failed, in that order.

    Args:
        scripts: Taken one by one, only when there is room.
        at_once: Most requests in the engine.
        stepped: Called after each step. What goes wrong with one is in its `error`; an interruption is raised. The
            engine is left with none of these requests, whatever happens.
        codec: Decodes segments in its thread while others are generated; a script is then done when its sound is.
    """
    source = iter(scripts)
    begun: list[Script] = []
    in_flight: list[tuple[Handle, Script, int]] = []
    try:
        while True:
            _fill(engine, source, at_once, begun, in_flight)
            if in_flight:
                engine.advance()
                if stepped is not None:
                    stepped()
                for landed in [item for item in in_flight if item[0].done]:
                    in_flight.remove(landed)
                    _land(*landed)
                    if codec is not None and landed[1].error is None:
                        try:
                            landed[1].decode(codec)
                        except Exception as error:
                            landed[1].error = error
            elif begun:
                begun[0].wait_decoded()
            done = [script for script in begun if script.error is not None or (script.done and script.decoded)]
            for script in done:
                for handle, _, _ in [item for item in in_flight if item[1] is script]:
                    handle.cancel()
                in_flight = [item for item in in_flight if item[1] is not script]
                if script.error is not None:
                    script.drop_sound()
                begun.remove(script)
                yield script
            if not (begun or done):
                return
    finally:
        for handle, _, _ in in_flight:
            handle.cancel()
        for script in begun:
            script.drop_sound()


def _fill(
    engine: Engine,
    source: Iterator[Script],
    at_once: int,
    begun: list[Script],
    in_flight: list[tuple[Handle, Script, int]],
) -> None:
    """Submit what can start: first of the scripts that have begun, in their order, then of new ones.

    As many as may be generated may wait for the codec besides.
    """
    for script in begun:
        _submit(engine, script, at_once, in_flight)
    while len(in_flight) < at_once and len(begun) < 2 * at_once:
        new = next(source, None)
        if new is None:
            return
        begun.append(new)
        _submit(engine, new, at_once, in_flight)


def _submit(engine: Engine, script: Script, at_once: int, in_flight: list[tuple[Handle, Script, int]]) -> None:
    while len(in_flight) < at_once and (ready := script.next_request()) is not None:
        index, request = ready
        try:
            in_flight.append((engine.submit(request), script, index))
        except Exception as error:
            script.error = error


def _land(handle: Handle, script: Script, index: int) -> None:
    try:
        script.take(index, handle.result())
    except Exception as error:
        script.error = error


def make_scripts(
    config: DiaConfig,
    texts: Sequence[str | bytes],
    prompts: Sequence[Tensor | Voice | None],
    prompt_text: str | None,
    split: str | None,
    params: SamplingParams,
    seeds: Sequence[int],
    frames_per_second: float = FRAMES_PER_SECOND,
) -> list[Script]:
    """One for each text, with its prompt's codes and its seed.

    Args:
        split: "auto" or None.

    Raises:
        InputError: For a value that cannot be used.
    """
    if split is not None and not (isinstance(split, str) and split == "auto"):
        raise InputError(f'split must be "auto" or None, not {shown(split)}')
    if prompt_text is not None:
        checked_text(prompt_text)
        if any(prompt is None for prompt in prompts):
            raise InputError("prompt_text needs audio_prompt: the recording in which it is said")
    found = []
    for text, prompt, seed in zip(texts, prompts, seeds, strict=True):
        voice = Voice(prompt, prompt_text or "") if isinstance(prompt, Tensor) else prompt
        if voice is not None and prompt_text is not None:
            voice = replace(voice, text=prompt_text)
        segments = cut(text, config, voice, frames_per_second) if split else [checked_text(text)]
        found.append(Script(config, segments, replace(params, seed=seed), voice, "", frames_per_second))
    return found


def speak_scripts(engine: Engine, scripts: Sequence[Script], progress: Progress, codec: "Codec | None" = None) -> None:
    """Speak all scripts at once. Warns of what there is to remark.

    Args:
        progress: As in `Dia.generate`; a bar counts segments too. Raises what ended one of the scripts.
        codec: As in `speak_all`.
    """
    which = [f"text {index}: " if len(scripts) > 1 else "" for index in range(len(scripts))]
    known = [warn_of(script, 0, text) for script, text in zip(scripts, which, strict=True)]
    count, total = sum(len(script.segments) for script in scripts), max(item.expected_steps() for item in scripts)
    start = engine.stats.steps
    with progress_of(progress, total, scripts[0].frames_per_second) as report:

        def stepped() -> None:
            if isinstance(report, StepBar) and count > len(scripts):
                report.segments(sum(script.spoken for script in scripts), count, total)
            steps = engine.stats.steps - start
            if report is not None and steps:
                report(steps)

        with closing(speak_all(engine, scripts, engine.state.sizes.batch, stepped, codec)) as ended:
            for script in ended:
                if script.error is not None:
                    raise script.error
    for script, before, text in zip(scripts, known, which, strict=True):
        warn_of(script, before, text)


def warn_of(script: Script, first: int = 0, which: str = "") -> int:
    """Warn of a script's remarks from the `first` on; return how many there are.

    Args:
        which: Goes before each.
    """
    for remark in script.remarks[first:]:
        warn(which + remark, TextWarning)
    return len(script.remarks)
