"""`Dia` with the constructors, methods and return values of the original package's, on the engine of dia-fast."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import soundfile
import torch
from torch import Tensor

from dia_fast.audio.audio import BLOCK, Audio, convert, load_audio
from dia_fast.audio.editing import at_speed, checked_speed
from dia_fast.checkpoint.loading import Checkpoint, open_checkpoint
from dia_fast.engine import Engine, generate
from dia_fast.engine.request import AnyRequest
from dia_fast.errors import CheckpointError, InputError, shown
from dia_fast.generation.inputs import FRAMES_PER_SECOND, least_seconds, texts_of
from dia_fast.generation.long_form import Script, make_scripts, speak_scripts
from dia_fast.generation.outcome import silence
from dia_fast.generation.prompts import Voice, checked_codes
from dia_fast.generation.sampling_params import MAX_SEED, RANDOM_SEED, AnySamplingParams, random_seed
from dia_fast.generation.voices import recording_of
from dia_fast.integrations.original.codecs import SoundCodec, as_codec, as_module
from dia_fast.integrations.original.config import ComputeDtype, OriginalConfig, as_config
from dia_fast.integrations.original.module import OriginalModel, as_model
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import apply_delay
from dia_fast.model.device import choose_ops
from dia_fast.text.segmentation import join_segments
from dia_fast.text.tokenizer import SPEAKER_IDS, TAG, TextWarning, checked_text, encode_text, warn_about
from dia_fast.utils.ambient import isolated
from dia_fast.utils.files import checked_path, replacing, uninterrupted
from dia_fast.utils.forks import OneProcess, check_device, renew_in_child
from dia_fast.utils.values import real_number, whole_number
from dia_fast.utils.warn import warn

DEFAULT_SAMPLE_RATE = 44100
SAMPLE_RATE_RATIO = 512
CODEC = "descript/dac_44khz"
_STEPS_PER_SECOND = 86  # as the original rounds them
# The engine reads a scale of 1 as "no guidance"; in the original's formula it is as good a number as any other.
_JUST_ABOVE_ONE = float(np.nextafter(np.float32(1), np.float32(2)))
_BEST_ALONE = 1e-30  # a top_p that only the best candidate is within, as the original does for 0 and below
_NEVER_EMPTY = ("FLAC", "MP3")  # files that libsndfile cannot read without a sample, or does not write at all
_told: set[str] = set()

# Methods of the original that are steps of its `generate`.
_INSIDE = frozenset(
    {
        "_encode_text", "_pad_text_input", "_prepare_text_input", "_prepare_audio_prompt", "_prepare_generation",
        "_decoder_step", "_generate_output",
    }
)  # fmt: skip

AudioPrompt: TypeAlias = str | os.PathLike[str] | Tensor | np.ndarray | None
Prompts: TypeAlias = AudioPrompt | list[AudioPrompt]
Voices: TypeAlias = Voice | str | os.PathLike[str] | list[Voice | str | os.PathLike[str]] | None


class _Report:
    """Report of the steps while they are made. Call it with the number of steps so far.

    count: texts; given: frames of the shortest prompt, from which the original counts its steps; verbose: print the
    original's lines; bar: what some forks are given, with tqdm's `update`, or None.
    """

    def __init__(self, count: int, given: int, verbose: bool, bar: Any) -> None:
        self.count, self.given, self.verbose, self.bar, self._done = count, given, verbose, bar, 0
        if verbose:
            print("generate: data loaded")
            print("generate: starting generation loop")
        self._start = time.perf_counter()

    def __call__(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.update(steps - self._done)
            self._done = steps
        step = self.given + steps
        if not self.verbose or step % _STEPS_PER_SECOND:
            return
        now = time.perf_counter()
        seconds, self._start = max(now - self._start, 1e-9), now
        print(
            f"generate step {step}: speed={_STEPS_PER_SECOND * self.count / seconds:.3f} tokens/s, "
            f"realtime factor={self.count / seconds:.3f}x"
        )


def tell_ignored(names: Sequence[str]) -> None:
    """Warn of arguments of a fork that make no difference here, of each once in a process."""
    new = [name for name in names if name not in _told]
    _told.update(new)
    if new:
        warn(f"generate: {', '.join(new)} of a fork of the original package makes no difference here", UserWarning)


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Dia(OneProcess):
    """The original package's `Dia`. Positional arguments, defaults and results are the same.

    `seed`, `split`, `voice` and `speed` of `generate` are new, and so is `voice`.

    dac_model: what encodes and decodes sound, and may be replaced at any time: a `dac.DAC`, a `transformers.DacModel`,
    a `Codec`, which is given the interface of a `dac.DAC`; None before it is loaded. model: a module with the weights,
    whose `load_state_dict` takes the original's names; it may be replaced too, by the original's own `DiaModel`.
    """

    quirks = False  # of the models that say nothing of it

    def __init__(
        self,
        config: Any,
        compute_dtype: str | ComputeDtype = ComputeDtype.FLOAT32,
        device: torch.device | str | None = None,
        load_dac: bool = True,
        *,
        dac_model: Any = None,
        dac_model_path: str | os.PathLike[str] | None = None,
        quirks: bool | None = None,
    ) -> None:
        """Make a Dia without weights.

        config: sizes; weights come with `from_pretrained`, `from_local` or `model.load_state_dict`. load_dac:
        without it `generate` returns codes. dac_model: as above, or the name of one for `load_codec`, instead of the
        default; dac_model_path: the same, by the name that forks have for it.

        quirks: repeat the original's off-by-one, which lets the model choose one code of the audio prompt (the last
        channel's in its last row); tokens are then those of the original. By default as `install` was told, else False.

        Raises InputError, CheckpointError.
        """
        self.config = OriginalConfig(as_config(config))
        self.compute_dtype = ComputeDtype(compute_dtype).to_dtype()
        self.device = torch.device(device) if device is not None else default_device()
        self.load_dac, self.quirks = load_dac, Dia.quirks if quirks is None else quirks
        self._model: OriginalModel | None = OriginalModel(self.config.native, self.device, self.compute_dtype)
        dac_model = dac_model_path if dac_model is None else dac_model
        self.dac_model = None if isinstance(dac_model, str | os.PathLike) else dac_model
        self._codec_name = os.fspath(dac_model) if isinstance(dac_model, str | os.PathLike) else None
        self._engine: Engine | None = None
        self._engine_version = 0
        renew_in_child(self)
        if self.dac_model is None and not load_dac:
            warn("load_dac=False: generate returns codes instead of sound", UserWarning)

    @property
    def model(self) -> OriginalModel | None:
        return self._model

    @model.setter
    def model(self, given: Any) -> None:
        if given is None:
            self._model = self._engine = None
        elif given is not self._model:
            self._model = as_model(given, self.config.native, self.device, self.compute_dtype)
            self._engine = None

    @property
    def dac_model(self) -> Any:
        return self._dac_model

    @dac_model.setter
    def dac_model(self, given: Any) -> None:
        if given is not None:
            as_codec(given)
        self._dac_model = as_module(given)

    def _renew(self) -> None:
        """In a new process: an engine of its own. The parent's is not freed, since its GPU memory is not ours."""
        self._left, self._engine = self._engine, None

    @classmethod
    def from_local(
        cls,
        config_path: str,
        checkpoint_path: str,
        compute_dtype: str | ComputeDtype = ComputeDtype.FLOAT32,
        device: torch.device | str | None = None,
        load_dac: bool = True,
        **more: Any,
    ) -> "Dia":
        """Load a `config.json` and a file of weights, of either layout. more: see the constructor.

        Raises FileNotFoundError for a missing file, CheckpointError (a RuntimeError) for one that cannot be used.
        """
        for path in (config_path, checkpoint_path):
            if not Path(path).exists():
                raise FileNotFoundError(f"{path}: no such file")
        config = DiaConfig.from_file(config_path)
        # By name: the classes for copies of the package have another order.
        made = cls(config, compute_dtype=compute_dtype, device=device, load_dac=load_dac, **more)
        return made._load(open_checkpoint(checkpoint_path, config=config), checkpoint_path)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str = "nari-labs/Dia-1.6B-0626",
        compute_dtype: str | ComputeDtype = ComputeDtype.FLOAT32,
        device: torch.device | str | None = None,
        load_dac: bool = True,
        **more: Any,
    ) -> "Dia":
        """Load a repository of the Hugging Face Hub, or a folder, in either layout. more: see the constructor.

        Raises CheckpointError (a RuntimeError).
        """
        checkpoint = open_checkpoint(model_name)
        made = cls(checkpoint.config, compute_dtype=compute_dtype, device=device, load_dac=load_dac, **more)
        return made._load(checkpoint, model_name)

    @isolated()
    def _load(self, checkpoint: Checkpoint, name: str) -> "Dia":
        """Take the weights, and the codec that is named, else the one in their folder, else the official models'."""
        from dia_fast.audio.codec import codec_for

        assert self._model is not None
        if self._codec_name is None:
            self._codec_name = codec_for(name)
        self._model.load(checkpoint.load(self.compute_dtype, self.device)).pack(progress=True)
        if self.load_dac and self.dac_model is None:
            self._load_dac_model()
        return self

    def _load_dac_model(self) -> None:
        from dia_fast.audio.codec import load_codec

        self.dac_model = load_codec(self._codec_name or CODEC, device=self.device, ops=choose_ops("auto", self.device))

    def generate(
        self,
        text: str | list[str],
        max_tokens: int | None = 3072,
        cfg_scale: float = 3.0,
        temperature: float = 1.2,
        top_p: float = 0.95,
        use_torch_compile: bool = False,
        cfg_filter_top_k: int | None = 45,
        audio_prompt: Prompts = None,
        audio_prompt_path: Prompts = None,
        use_cfg_filter: bool | None = None,
        verbose: bool = False,
        *,
        seed: int | list[int] | None = None,
        pbar: Any = None,
        text_to_generate_size: int | None = None,
        split: str | None = None,
        voice: Voices = None,
        speed: float = 1.0,
    ) -> Any:
        """Speak a text, or a list of them as one batch.

        max_tokens: rows in all, the audio prompt's included; None for as many as the model has positions. cfg_scale:
        any; 0 is no guidance. top_p: 1 and above keeps every candidate, 0 and below the best alone. cfg_filter_top_k:
        None and 0 keep all. audio_prompt: a path or codes `[frames, channels]`, a tensor or an array, for each text of
        a list its own; only the new words are returned. use_torch_compile: makes no difference here.
        verbose: prints the original's lines. seed: as `torch.manual_seed` takes it, or -1 for a random one; by default
        drawn from torch's random numbers, so that `torch.manual_seed` decides. pbar, text_to_generate_size: of forks;
        the first hears of every step through its `update`, the second makes no difference.

        Of dia-fast alone are the last three. split: `"auto"` cuts a text that is too long for the model into segments,
        each of up to `max_tokens` rows, and speaks them in one voice, as `dia_fast.Dia.generate` does. voice: what
        `Dia.voice` makes or takes, instead of audio_prompt, or a list with one for each text; the text holds the new
        words alone. speed: 0.25 to 4 times as fast at the same pitch, with the extra `media`. With split or voice the
        prompt is as transformers has it, whatever `quirks` says, and a segment that stays silent is tried again.

        Returns float32 samples `[n]` at 44.1 kHz, or with `load_dac=False` codes `[frames, channels]` int64, as a numpy
        array; for a list of two or more texts a list of them. Raises InputError (a ValueError) for whatever cannot be
        used, CheckpointError (a RuntimeError) if the weights were not loaded.
        """
        if audio_prompt_path is not None:
            warn("audio_prompt_path is deprecated: use audio_prompt", FutureWarning)
            audio_prompt = audio_prompt_path
        if use_cfg_filter is not None:
            warn("use_cfg_filter is deprecated and does nothing", FutureWarning)
        if text_to_generate_size is not None:
            tell_ignored(["text_to_generate_size"])
        if checked_speed(speed) != 1 and not self.load_dac:
            raise InputError(f"speed {speed:g} changes sound, and this Dia returns codes (load_dac=False)")
        model = self._ready()
        start = time.perf_counter()
        texts = texts_of(text)
        voices = self._voices(voice, audio_prompt, len(texts))
        if voice is None:
            prompts = self._prompts(audio_prompt, len(texts))
        else:
            prompts = [None if item is None else item.codes for item in voices]
        limit = self.config.native.decoder.max_position_embeddings if max_tokens is None else max_tokens
        settings = _settings(cfg_scale, temperature, top_p, cfg_filter_top_k)
        given = min(0 if prompt is None else len(prompt) for prompt in prompts)
        report = _Report(len(texts), given, verbose, pbar) if verbose or pbar is not None else None
        if split is not None or voice is not None:
            frames = self._in_segments(model, texts, prompts, voices, split, limit, settings, seed, report)
        else:
            requests = self._requests(texts, prompts, limit, settings, seed)
            spoken = generate(model, requests, progress=report, engine=self._engine_for(model))
            frames = [[item.frames] for item in spoken]
            for item in spoken:
                if not len(item.frames):
                    warn(silence(1), TextWarning)
        if verbose:
            steps = sum(len(part) for parts in frames for part in parts) / len(frames)
            print(f"generate: avg steps={steps:.1f}, total duration={time.perf_counter() - start:.3f}s")
        outputs = [self._output(parts, speed) for parts in frames]
        return outputs if len(outputs) > 1 else outputs[0]

    def voice(self, source: str | os.PathLike[str] | Tensor | np.ndarray, *, text: str | None = None) -> Voice:
        """Turn a recording into a voice, once, to be given as `voice`.

        Args:
            source: A recording's path; a folder that holds one and its transcript; the name of a voice that `dia-fast
                voices add` has saved; or codes `[frames, channels]`.
            text: What is said in it; by default the `.txt` file beside the recording.

        Raises:
            InputError: For a recording that cannot be used, or without a transcript.
        """
        if isinstance(source, str | os.PathLike):
            path, said = recording_of(checked_path(source, "source"), text)
            return Voice(self._prompt(path), said)
        if text is None:
            raise InputError("text: say what is said in the recording")
        return Voice(self._prompt(source), checked_text(text).strip())

    def __getattr__(self, name: str) -> Any:
        if name in _INSIDE:
            raise AttributeError(
                f"{name} of the original's Dia has no counterpart in dia_fast, whose engine makes all steps: call "
                "generate"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def load_audio(self, audio_path: str) -> Tensor:
        """The codes of an audio file, `[frames, channels]` int64, to be used as `audio_prompt`.

        Raises CheckpointError (a RuntimeError) without a codec, InputError for a file that cannot be used.
        """
        self._codec()
        return self._encode(torch.from_numpy(load_audio(audio_path, DEFAULT_SAMPLE_RATE))[None].to(self.device))

    def save_audio(self, path: str, audio: np.ndarray) -> None:
        """Write samples as a file of any kind that libsndfile knows by its extension, complete or not at all.

        Args:
            path: Of the file.
            audio: `[n]` or `[n, channels]`, floating point or integers of 16 or 32 bits; none of them, too.

        Raises:
            InputError: If it cannot be written.
        """
        target = checked_path(path)
        extension = target.suffix.lower()
        kind = extension.removeprefix(".").upper()
        kind = {"AIF": "AIFF", "OPUS": "OGG"}.get(kind, kind)
        if kind not in soundfile.available_formats():
            raise InputError(
                f"cannot write {target}: extension {target.suffix!r} names no format of libsndfile; use .wav"
            )
        samples = _samples(audio)
        if not len(samples) and kind in _NEVER_EMPTY:
            samples = np.zeros((1, *samples.shape[1:]), np.float32)
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        subtype = "OPUS" if extension == ".opus" else None
        rate = 48_000 if subtype else DEFAULT_SAMPLE_RATE
        if subtype:
            samples = convert(samples, DEFAULT_SAMPLE_RATE, rate)
            channels = 1
        try:
            with (
                replacing(target) as temporary,
                uninterrupted(),
                soundfile.SoundFile(temporary, "w", rate, channels, subtype, format=kind) as file,
            ):
                for start in range(0, len(samples), BLOCK):
                    file.write(samples[start : start + BLOCK])
        except soundfile.LibsndfileError as error:
            raise InputError(f"cannot write {target} as {kind}: {error.error_string}") from error

    def encode_audio_prompt(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """The codes of a waveform, `[n]`, `[channels, n]` or `[1, channels, n]`, as forks name it.

        Returns codes `[frames, channels]` int32, to be used as `audio_prompt`. Raises InputError, CheckpointError.
        """
        self._codec()
        wave = waveform.detach().cpu()
        if not wave.is_floating_point():
            wave = wave.float() / torch.iinfo(wave.dtype).max
        wave = wave[0] if wave.ndim == 3 and len(wave) == 1 else wave
        samples = convert(wave.float().numpy().T, sample_rate, DEFAULT_SAMPLE_RATE)
        return self._encode(torch.from_numpy(np.clip(samples, -1.0, 1.0))[None].to(self.device)).int()

    def reset_state(self) -> None:
        """Does nothing: a call of a fork, whose steps leave state behind. Here they leave none."""

    @isolated()
    def _encode(self, audio: Tensor) -> Tensor:
        """Samples `[1, n]` at 44.1 kHz to codes `[frames, channels]`, through the codec's own rate."""
        codec, samples = self._codec(), audio.reshape(-1).float()
        if (rate := _rate_of(codec)) != DEFAULT_SAMPLE_RATE:
            samples = torch.from_numpy(convert(samples.cpu().numpy(), DEFAULT_SAMPLE_RATE, rate)).to(samples.device)
        return codec.encode(samples).to(self.device)

    @isolated()
    def _decode(self, audio_codes: Tensor) -> Tensor:
        """Codes `[frames, channels]` to samples `[n]` float32 at 44.1 kHz, through the codec's own rate."""
        codec = self._codec()
        samples = codec.decode(audio_codes)
        if (rate := _rate_of(codec)) == DEFAULT_SAMPLE_RATE:
            return samples
        return torch.from_numpy(convert(samples.detach().float().cpu().numpy(), rate, DEFAULT_SAMPLE_RATE))

    def _codec(self) -> SoundCodec:
        if self.dac_model is None and self.load_dac:
            self._load_dac_model()
        if self.dac_model is None:
            raise CheckpointError("this Dia has no codec (load_dac=False): sound needs one; codes do not")
        return as_codec(self.dac_model)

    def _ready(self) -> OriginalModel:
        """The model, its weights laid out for inference. Raises CheckpointError if there are none."""
        if self._model is None or not self._model.loaded:
            raise CheckpointError(
                "this Dia has no weights: make it with from_pretrained or from_local, or load them with "
                "model.load_state_dict"
            )
        if not self._model.packed:
            self._model.pack()
        return self._model

    def _engine_for(self, model: OriginalModel) -> Engine | None:
        """On a GPU one engine for all calls, which captures graphs once; elsewhere None: one for each call is cheap."""
        if model.device.type == "cpu":
            return None
        if self._engine is None or self._engine_version != model.version:
            check_device(model.device)
            self._engine = None  # its memory first
            self._engine, self._engine_version = Engine(model), model.version
        return self._engine

    @isolated()
    def _prompts(self, given: Prompts, count: int) -> list[Tensor | None]:
        """The codes of each text's prompt, or None."""
        listed = given if isinstance(given, list) else [given] * (count if given is None else 1)
        if len(listed) != count:
            raise InputError(f"audio_prompt has {len(listed)} entries for {count} texts: give a list with one for each")
        return [None if item is None else self._prompt(item) for item in listed]

    def _voices(self, given: Voices, audio_prompt: Prompts, count: int) -> list[Voice | None]:
        """The voice of each text, or None."""
        if given is None:
            return [None] * count
        if audio_prompt is not None:
            raise InputError("audio_prompt and voice are two voices for one text: give one of them")
        listed = given if isinstance(given, list) else [given] * count
        if len(listed) != count:
            raise InputError(f"voice has {len(listed)} entries for {count} texts: give one for each")
        for item in listed:
            if not isinstance(item, Voice | str | os.PathLike):
                raise InputError(f"voice must be what Dia.voice makes, a recording's path or a name, not {shown(item)}")
        made = {item: self.voice(item) for item in listed if not isinstance(item, Voice)}
        return [item if isinstance(item, Voice) else made[item] for item in listed]

    def _prompt(self, given: Any) -> Tensor:
        config = self.config.native
        if isinstance(given, str | os.PathLike):
            given = self.load_audio(os.fspath(given))
        elif not isinstance(given, Tensor | np.ndarray):
            raise InputError(f"audio_prompt must be a path or codes [frames, channels], not {shown(given)}")
        room = config.decoder.max_position_embeddings - max(config.delay_pattern) - 2
        return checked_codes(given, config.decoder.num_channels, config.decoder.eos_token_id, room)

    @isolated()
    def _requests(
        self, texts: list[str | bytes], prompts: list[Tensor | None], limit: int, settings: dict[str, Any], seed: Any
    ) -> list[AnyRequest]:
        config = self.config.native
        longest = max(0 if prompt is None else len(prompt) for prompt in prompts)
        limit = whole_number("max_tokens", limit, 0, None)
        if limit < longest + 1:
            raise InputError(f"max_tokens must be more than the {longest} frames of the audio prompt, not {limit}")
        requests = []
        for text, prompt, item_seed in zip(texts, prompts, self._seeds(seed, len(texts)), strict=True):
            ids = self._ids(text)
            frames = 0 if prompt is None else len(prompt)
            start: dict[str, Any] = {"prompt": prompt}
            if self.quirks and frames == longest:
                codes = (
                    torch.empty(0, config.decoder.num_channels, dtype=torch.float32, device="cpu")
                    if prompt is None
                    else prompt
                )
                start = {"delayed_codes": apply_delay(codes, config.delay_pattern, self.config.bos_token_id)[:-1]}
            requests.append(AnyRequest(ids, **start, max_new_tokens=limit - frames, seed=item_seed, **settings))
        return requests

    def _in_segments(
        self,
        model: OriginalModel,
        texts: list[str | bytes],
        prompts: list[Tensor | None],
        voices: list[Voice | None],
        split: str | None,
        limit: int,
        settings: dict[str, Any],
        seed: Any,
        report: _Report | None,
    ) -> list[list[Tensor]]:
        """Speak texts as `dia_fast.Dia` does; return the frames of each one's segments."""
        config, least = self.config.native, max(self.config.delay_pattern) + 2
        pace = getattr(self._codec(), "frames_per_second", FRAMES_PER_SECOND) if self.load_dac else FRAMES_PER_SECOND
        scripts: list[Script] = []
        for text, prompt, voice, item_seed in zip(texts, prompts, voices, self._seeds(seed, len(texts)), strict=True):
            if voice is None and prompt is not None:
                raise InputError(
                    "split needs the words of the audio prompt, to speak each segment after them: give the recording "
                    "as voice, with its transcript, instead of audio_prompt"
                )
            frames = 0 if prompt is None else len(prompt)
            if whole_number("max_tokens", limit, 0, None) < frames + least:
                raise InputError(
                    f"max_tokens must be at least {frames + least}{' with this voice' if frames else ''}, not {limit}"
                )
            params = AnySamplingParams(max_new_tokens=limit - frames, **settings)
            scripts += make_scripts(config, [text], [voice], None, split, params, [item_seed], pace)
        speak_scripts(self._engine_for(model) or Engine(model), scripts, report or False)
        return [[frames for frames in script.frames if frames is not None] for script in scripts]

    @isolated()
    def _seeds(self, seed: Any, count: int) -> list[int]:
        if seed is None:
            return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device="cpu").tolist()
        seeds = list(seed) if isinstance(seed, list | tuple) else [seed] * count
        if len(seeds) != count:
            raise InputError(f"seed has {len(seeds)} entries for {count} texts: give one for each, or one int for all")
        return [_seed(item) for item in seeds]

    def _ids(self, text: str | bytes) -> list[int]:
        """A text as the encoder reads it, with the warnings about it. The original speaks without words, too."""
        longest = self.config.native.encoder.max_position_embeddings
        if isinstance(text, str) and not TAG.sub("", text).strip():
            warn("the text has no words: what is spoken is left to chance", TextWarning)
            data = text.encode()
            for tag, number in SPEAKER_IDS.items():
                data = data.replace(tag.encode(), bytes([number]))
            return list(data[:longest]) or [0]  # padding, which is what the unconditional branch reads
        warn_about(text, max_length=longest, least_seconds=least_seconds(self.config.native))
        return encode_text(text, max_length=longest)

    @isolated()
    def _output(self, parts: list[Tensor], speed: float) -> np.ndarray:
        """The sound of a text's segments, or their codes."""
        if not self.load_dac:
            return torch.cat(parts).numpy()
        sounds = [self._decode(frames).cpu().numpy() for frames in parts if len(frames)]
        if len(sounds) == 1 and speed == 1:
            return sounds[0]
        return at_speed(Audio(join_segments(sounds, DEFAULT_SAMPLE_RATE), DEFAULT_SAMPLE_RATE), speed).samples


def _settings(cfg_scale: Any, temperature: Any, top_p: Any, top_k: Any) -> dict[str, Any]:
    """The original's settings as those of a request. Raises InputError for what is no number."""
    scale, share = real_number("cfg_scale", cfg_scale), real_number("top_p", top_p)
    if math.isnan(share):
        raise InputError("top_p must be a number, not nan; 1 keeps every candidate")
    return {
        "guidance_scale": None if scale == 0 else _JUST_ABOVE_ONE if scale == 1 else scale,
        "temperature": temperature,
        "top_p": min(share, 1.0) if share > 0 else _BEST_ALONE,
        "top_k": None if top_k is None or top_k == 0 else top_k,
    }


def _rate_of(codec: SoundCodec) -> int:
    """Samples per second of a codec: of those of other packages, what the original's has."""
    return int(getattr(codec, "sample_rate", DEFAULT_SAMPLE_RATE))


def _seed(given: Any) -> int:
    """A seed as `torch.manual_seed` takes it: negative ones count back from 2^64; -1 is a random one."""
    seed = whole_number("seed", given, -(1 << 63), MAX_SEED, "-1 draws one")
    return random_seed() if seed == RANDOM_SEED else seed % (MAX_SEED + 1)


def _samples(audio: Any) -> np.ndarray:
    """Turn a caller's sound into samples that soundfile can write. Raises InputError."""
    samples = np.asarray(audio.detach().cpu() if isinstance(audio, Tensor) else audio)
    if samples.ndim not in (1, 2) or 0 in samples.shape[1:] or samples.dtype.kind not in "fi":
        raise InputError(
            f"audio must be numbers of shape [n] or [n, channels], not {samples.dtype} of {list(samples.shape)}"
        )
    if samples.dtype.kind == "f":
        return np.clip(np.nan_to_num(samples.astype(np.float32)), -1.0, 1.0)
    if samples.dtype.itemsize not in (2, 4):
        raise InputError(f"audio holds {samples.dtype}; integers must be of 16 or 32 bits, or give floating point")
    return samples
