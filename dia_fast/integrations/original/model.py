"""`Dia` with the constructors, methods and return values of the original package's, on the engine of dia-fast."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dia_fast.audio.audio import Audio, load_audio
from dia_fast.checkpoint.loading import Checkpoint, open_checkpoint
from dia_fast.engine import Engine, Generation, Request, generate
from dia_fast.errors import CheckpointError, InputError, shown
from dia_fast.generation.inputs import least_seconds, texts_of
from dia_fast.generation.outcome import silence
from dia_fast.generation.prompts import checked_codes
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.integrations.original.codecs import SoundCodec, as_codec
from dia_fast.integrations.original.config import ComputeDtype, OriginalConfig, as_config
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import apply_delay
from dia_fast.model.model import DiaModel
from dia_fast.text.tokenizer import TextWarning, encode_text, warn_about
from dia_fast.utils.ambient import isolated
from dia_fast.utils.forks import OneProcess, check_device, renew_in_child
from dia_fast.utils.values import whole_number
from dia_fast.utils.warn import warn
from dia_kernels import get_ops

DEFAULT_SAMPLE_RATE = 44100
SAMPLE_RATE_RATIO = 512
CODEC = "descript/dac_44khz"
_STEPS_PER_SECOND = 86  # as the original rounds them
# The engine reads a scale of 1 as "no guidance"; in the original's formula it is as good a number as any other.
_JUST_ABOVE_ONE = float(np.nextafter(np.float32(1), np.float32(2)))

# Methods of the original that are steps of its `generate`.
_INSIDE = frozenset(
    {
        "_encode_text", "_pad_text_input", "_prepare_text_input", "_prepare_audio_prompt", "_prepare_generation",
        "_decoder_step", "_generate_output",
    }
)  # fmt: skip

AudioPrompt: TypeAlias = str | os.PathLike[str] | Tensor | np.ndarray | None
Prompts: TypeAlias = AudioPrompt | list[AudioPrompt]


class _Report:
    """The lines that the original prints with `verbose` while it generates. Call it with the number of steps so far.

    count: texts; given: frames of the shortest prompt, from which the original counts its steps.
    """

    def __init__(self, count: int, given: int) -> None:
        self.count, self.given = count, given
        print("generate: data loaded")
        print("generate: starting generation loop")
        self._start = time.perf_counter()

    def __call__(self, steps: int) -> None:
        step = self.given + steps
        if step % _STEPS_PER_SECOND:
            return
        now = time.perf_counter()
        seconds, self._start = max(now - self._start, 1e-9), now
        print(
            f"generate step {step}: speed={_STEPS_PER_SECOND * self.count / seconds:.3f} tokens/s, "
            f"realtime factor={self.count / seconds:.3f}x"
        )


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Dia(OneProcess):
    """The original package's `Dia`. Positional arguments, defaults and results are the same; `seed` is new.

    dac_model: what encodes and decodes sound, and may be replaced at any time: a `dac.DAC`, a `transformers.DacModel`,
    a `Codec`; None before it is loaded. model: the `DiaModel` with the weights, None before those are loaded.
    """

    def __init__(
        self,
        config: Any,
        compute_dtype: str | ComputeDtype = ComputeDtype.FLOAT32,
        device: torch.device | str | None = None,
        load_dac: bool = True,
        *,
        dac_model: Any = None,
        quirks: bool = False,
    ) -> None:
        """config: sizes; weights come with `from_pretrained` or `from_local`. load_dac: without it `generate` returns
        codes. dac_model: as above, or the name of one for `load_codec`, instead of the default.

        quirks: repeat the original's off-by-one, which lets the model choose one code of the audio prompt (the last
        channel's in its last row); tokens are then those of the original. Raises InputError, CheckpointError.
        """
        self.config = OriginalConfig(as_config(config))
        self.compute_dtype = ComputeDtype(compute_dtype).to_dtype()
        self.device = torch.device(device) if device is not None else default_device()
        self.load_dac, self.quirks = load_dac, quirks
        self.model: DiaModel | None = None
        self.dac_model: Any = None if isinstance(dac_model, str | os.PathLike) else dac_model
        self._codec_name = os.fspath(dac_model) if isinstance(dac_model, str | os.PathLike) else CODEC
        self._engine: Engine | None = None
        renew_in_child(self)
        if self.dac_model is not None:
            as_codec(self.dac_model)
        elif not load_dac:
            warn("load_dac=False: generate returns codes instead of sound", UserWarning)

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
        """Loads a `config.json` and a file of weights, of either layout. more: see the constructor.

        Raises FileNotFoundError for a missing file, CheckpointError (a RuntimeError) for one that cannot be used.
        """
        for path in (config_path, checkpoint_path):
            if not Path(path).exists():
                raise FileNotFoundError(f"{path}: no such file")
        config = DiaConfig.from_file(config_path)
        return cls(config, compute_dtype, device, load_dac, **more)._load(
            open_checkpoint(checkpoint_path, config=config)
        )

    @classmethod
    def from_pretrained(
        cls,
        model_name: str = "nari-labs/Dia-1.6B-0626",
        compute_dtype: str | ComputeDtype = ComputeDtype.FLOAT32,
        device: torch.device | str | None = None,
        load_dac: bool = True,
        **more: Any,
    ) -> "Dia":
        """Loads a repository of the Hugging Face Hub, or a folder, in either layout. more: see the constructor.

        Raises CheckpointError (a RuntimeError).
        """
        checkpoint = open_checkpoint(model_name)
        return cls(checkpoint.config, compute_dtype, device, load_dac, **more)._load(checkpoint)

    @isolated()
    def _load(self, checkpoint: Checkpoint) -> "Dia":
        ops = get_ops("auto", self.device)
        weights = checkpoint.load(self.compute_dtype, self.device)
        self.model = DiaModel(checkpoint.config, ops).load(weights).pack(progress=True)
        if self.load_dac and self.dac_model is None:
            self._load_dac_model()
        return self

    def _load_dac_model(self) -> None:
        from dia_fast.audio.codec import load_codec

        self.dac_model = load_codec(self._codec_name, device=self.device, ops=get_ops("auto", self.device))

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
    ) -> Any:
        """Speaks a text, or a list of them as one batch.

        max_tokens: rows in all, the audio prompt's included; None for as many as the model has positions. cfg_scale:
        from 1 to 100, or 0 for no guidance. audio_prompt: a path or codes `[frames, channels]`, a tensor or an array,
        for each text of a list its own; only the new words are returned. use_torch_compile: makes no difference here.
        verbose: prints the original's lines. seed: by default drawn from torch's random numbers, so that
        `torch.manual_seed` decides.
        Returns float32 samples `[n]` at 44.1 kHz, or with `load_dac=False` codes `[frames, channels]` int64, as a numpy
        array; for a list of two or more texts a list of them. Raises InputError (a ValueError) for whatever cannot be
        used, CheckpointError (a RuntimeError) if the weights were not loaded.
        """
        if audio_prompt_path is not None:
            warn("audio_prompt_path is deprecated: use audio_prompt", FutureWarning)
            audio_prompt = audio_prompt_path
        if use_cfg_filter is not None:
            warn("use_cfg_filter is deprecated and does nothing", FutureWarning)
        if self.model is None:
            raise CheckpointError("this Dia has no weights: make it with from_pretrained or from_local")
        start = time.perf_counter()
        texts = texts_of(text)
        prompts = self._prompts(audio_prompt, len(texts))
        limit = self.config.decoder_config.max_position_embeddings if max_tokens is None else max_tokens
        settings = {
            "guidance_scale": None if cfg_scale == 0 else _JUST_ABOVE_ONE if cfg_scale == 1 else cfg_scale,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": cfg_filter_top_k,
        }
        if isinstance(cfg_scale, int | float) and 0 < cfg_scale < 1:
            raise InputError(f"cfg_scale must be 0 (no guidance) or from 1 to 100, not {cfg_scale}")
        for item in texts:
            longest = self.config.encoder_config.max_position_embeddings
            warn_about(item, max_length=longest, least_seconds=least_seconds(self.config.native))
        requests = self._requests(texts, prompts, limit, settings, seed)
        given = min(0 if prompt is None else len(prompt) for prompt in prompts)
        report = _Report(len(requests), given) if verbose else None
        spoken = generate(self.model, requests, progress=report, engine=self._engine_for(requests))
        if verbose:
            steps = sum(len(item.frames) for item in spoken) / len(spoken)
            print(f"generate: avg steps={steps:.1f}, total duration={time.perf_counter() - start:.3f}s")
        for result in spoken:
            if not len(result.frames):
                warn(silence(1), TextWarning)
        outputs = [self._output(item) for item in spoken]
        return outputs if len(outputs) > 1 else outputs[0]

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
        """Writes samples as a .wav, .flac, .ogg, .mp3 or .aiff file, complete or not at all. Raises InputError."""
        Audio(audio, DEFAULT_SAMPLE_RATE).save(path)

    @isolated()
    def _encode(self, audio: Tensor) -> Tensor:
        """Samples `[1, n]` at 44.1 kHz to codes `[frames, channels]`."""
        return self._codec().encode(audio.reshape(-1).float()).to(self.device)

    @isolated()
    def _decode(self, audio_codes: Tensor) -> Tensor:
        """Codes `[frames, channels]` to samples `[n]` float32."""
        return self._codec().decode(audio_codes)

    def _codec(self) -> SoundCodec:
        if self.dac_model is None:
            raise CheckpointError("this Dia has no codec (load_dac=False): sound needs one; codes do not")
        return as_codec(self.dac_model)

    def _engine_for(self, requests: Sequence[Request]) -> Engine | None:
        """On a GPU one engine for all calls, which captures graphs once; elsewhere None: one for each call is cheap."""
        assert self.model is not None
        if self.device.type == "cpu":
            return None
        if self._engine is None:
            check_device(self.device)
            self._engine = Engine(self.model)
        return self._engine

    @isolated()
    def _prompts(self, given: Prompts, count: int) -> list[Tensor | None]:
        """The codes of each text's prompt, or None."""
        listed = given if isinstance(given, list) else [given] * (count if given is None else 1)
        if len(listed) != count:
            raise InputError(f"audio_prompt has {len(listed)} entries for {count} texts: give a list with one for each")
        return [None if item is None else self._prompt(item) for item in listed]

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
    ) -> list[Request]:
        config = self.config.native
        longest = max(0 if prompt is None else len(prompt) for prompt in prompts)
        limit = whole_number("max_tokens", limit, 0, None)
        if limit < longest + 1:
            raise InputError(f"max_tokens must be more than the {longest} frames of the audio prompt, not {limit}")
        requests = []
        for text, prompt, item_seed in zip(texts, prompts, self._seeds(seed, len(texts)), strict=True):
            ids = encode_text(text, max_length=config.encoder.max_position_embeddings)
            frames = 0 if prompt is None else len(prompt)
            start: dict[str, Any] = {"prompt": prompt}
            if self.quirks and frames == longest:
                codes = (
                    torch.empty(0, config.decoder.num_channels, dtype=torch.float32, device="cpu")
                    if prompt is None
                    else prompt
                )
                start = {"delayed_codes": apply_delay(codes, config.delay_pattern, self.config.bos_token_id)[:-1]}
            requests.append(Request(ids, **start, max_new_tokens=limit - frames, seed=item_seed, **settings))
        return requests

    @isolated()
    def _seeds(self, seed: Any, count: int) -> list[int | None]:
        if seed is None:
            return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device="cpu").tolist()
        seeds = list(seed) if isinstance(seed, list | tuple) else [seed] * count
        if len(seeds) != count:
            raise InputError(f"seed has {len(seeds)} entries for {count} texts: give one for each, or one int for all")
        return [SamplingParams(seed=item).seed for item in seeds]

    def _output(self, item: Generation) -> np.ndarray:
        if not self.load_dac:
            return item.frames.numpy()
        if not len(item.frames):
            return np.zeros(0, np.float32)
        return self._decode(item.frames).cpu().numpy()
