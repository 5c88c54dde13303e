"""The front door: `Dia`."""

import math
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dia_fast.audio.audio import Audio
from dia_fast.audio.code_store import CodeStore, default_cache
from dia_fast.audio.editing import at_speed, checked_speed, without_silence
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.engine import MAX_BATCH, Engine, Hooks
from dia_fast.errors import CheckpointError, InputError, not_finite, shown
from dia_fast.generation import streaming
from dia_fast.generation.inputs import (
    FRAMES_PER_SECOND,
    AnyCodec,
    Memory,
    Progress,
    Prompts,
    Seeds,
    Texts,
    check_codec,
    checked_delayed_codes,
    choose_codec_dtype,
    engine_limits,
    ids_of,
    is_list,
    one_text,
    params_for,
    progress_of,
    seeds_of,
    texts_of,
)
from dia_fast.generation.long_form import Script, make_scripts, speak_scripts
from dia_fast.generation.prompts import (
    AudioPrompt,
    Voice,
    cut_prompts,
    encode_prompts,
    longest_prompt,
    prompt_for_each,
)
from dia_fast.generation.sampling_params import SamplingOptions, SamplingParams
from dia_fast.generation.voices import find_voice, missing, recording_of
from dia_fast.model.config import DiaConfig
from dia_fast.model.cpu_weights import check_product, try_product
from dia_fast.model.device import choose_device, choose_dtype, choose_ops
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import check_weights
from dia_fast.text.tokenizer import checked_text, with_tag
from dia_fast.utils.files import checked_path
from dia_fast.utils.forks import OneProcess, check_device, renew_in_child

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dia_fast.audio.codec import Codec
    from dia_kernels.ops import OwnOps


class Dia(OneProcess):
    """A loaded model and, from their first use on, a codec and an engine. Make one with `Dia.from_pretrained`.

    The result of a call depends on its arguments alone. Calls from several threads share the batch of one engine. Its
    memory stays taken until `close`, or the end of a `with` block. It belongs to its process: it cannot be copied or
    pickled, and a forked child makes an engine of its own (`dia_fast.utils.forks`).

    Args:
        model: With its weights loaded.
        codec: As in `from_pretrained`.
        max_batch: As in `from_pretrained`.
        memory: As in `from_pretrained`.
        background: As in `from_pretrained`.
        hooks: As in `from_pretrained`.
        codec_dtype: As in `from_pretrained`.
    """

    def __init__(
        self,
        model: DiaModel,
        codec: AnyCodec = None,
        *,
        max_batch: int = MAX_BATCH,
        memory: Memory = None,
        background: bool = False,
        hooks: Hooks | None = None,
        codec_dtype: torch.dtype | str | None = None,
    ) -> None:
        check_codec(codec)
        kind = choose_codec_dtype(codec_dtype, codec, model.device)
        if hooks is not None and not isinstance(hooks, Hooks):
            raise InputError(f"hooks must be a dia_fast.engine.Hooks or None, not {shown(hooks)}")
        self.model = model
        self._codec = codec
        self._load_codec: dict[str, Any] = {"device": model.device, "ops": model.ops, "dtype": kind}
        self.defaults = SamplingParams()
        self._engine: Engine | None = None
        self._prompt_codes: dict[bytes, Tensor] = {}
        self._store: CodeStore | None = None
        self._limits = engine_limits(max_batch, memory)
        if not isinstance(background, bool):
            raise InputError(f"background must be True or False, not {shown(background)}")
        self._background, self._hooks = background, hooks
        self._left: Engine | None = None
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        """In a new process: locks and an engine of its own. Nothing of the parent's, its GPU memory least, is freed."""
        self._making = threading.RLock()
        self._left, self._engine = self._engine or self._left, None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        ops: "OwnOps | None" = None,
        codec: AnyCodec = "auto",
        max_batch: int = MAX_BATCH,
        memory: Memory = None,
        background: bool = False,
        hooks: Hooks | None = None,
        codec_dtype: torch.dtype | str | None = None,
        weights: str | None = None,
        pack: bool | str = True,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Dia":
        """Load a checkpoint in the transformers or the original layout.

        Args:
            name_or_path: Hub repository (`nari-labs/Dia-1.6B-0626`), folder, file of weights, folder of a LoRA adapter,
                or `"demo"` for the voice of the package.
            device: By default the GPU if torch sees one, else the CPU.
            dtype: By default bfloat16 on a GPU (float16 where it lacks that), float32 on a CPU.
            backend: The ops, `"torch"`, `"triton"` or `"auto"` (triton on a GPU).
            ops: Ops of your own in the place of the backend's: by name, a module that defines them, or
                `"module:name"` (see `dia_kernels.with_ops`).
            codec: Hub repository, folder or file of a DAC, loaded when first used; `"auto"` is the folder `codec` in
                the model's folder if there is one, else `descript/dac_44khz`; `"descript"` the dac package's own; a
                loaded codec; None for none, which leaves `generate_codes`.
            max_batch: Most texts spoken at once, 1 to 32; more wait.
            memory: For keys and values, in bytes or as in `"4GB"`; by default what `max_batch` texts can need, at most
                half of what is free at first use. A GPU sets it aside then; on a CPU it is taken as it is used.
            background: Make the steps in a thread of their own, so that a stream goes on, up to 10 s ahead, while what
                it gave is played.
            hooks: Functions of the caller's that are called in every decode step (docs/research.md).
            codec_dtype: `"fp32"`, the default, computes sound in float32 throughout, never in TF32. `"fp16"` is for
                serving on a GPU: operands of convolutions in float16, sums and activations in float32, an error far
                below the signal and less than bf16 has.
            weights: `"int8"` keeps the matrices in 8 bits, rounded while they load, `"int8-mlp"` those of the MLPs and
                the heads, `"float"` none; by default what the checkpoint holds (docs/weights.md).
            pack: On a CPU, lay weights in 8 and 16 bits out for the product that this processor is fast with, or for
                those of these names (`dia-fast doctor` lists them); False leaves them as they are, for
                `DiaModel.state_dict` and training.
            revision: Branch, tag or commit on the Hub.
            local_files_only: Stay offline.

        Raises:
            InputError: For an argument that cannot be used.
            CheckpointError: For a checkpoint that cannot be used.
        """
        if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
            raise InputError(f"name_or_path must be a Hub repository or a path, not {shown(name_or_path)}")
        check_codec(codec)
        engine_limits(max_batch, memory)
        place = choose_device(device)
        choose_codec_dtype(codec_dtype, codec, place)
        kind = choose_dtype(dtype, place)
        check_weights(weights)
        check_product(pack, kind, place)
        op_set = choose_ops(backend, place, ops)
        checkpoint = open_checkpoint(os.fspath(name_or_path), revision=revision, local_files_only=local_files_only)
        weights = weights or checkpoint.weights
        if weights != "int8":
            try_product(fused_shapes(checkpoint.config).values(), pack, kind, place)
        model = DiaModel(checkpoint.config, op_set).load(checkpoint.load_as(weights, kind, place))
        model.pack(pack, progress=True)
        if isinstance(codec, str | os.PathLike):
            from dia_fast.audio.codec import codec_for

            codec = codec_for(name_or_path, codec)
        limits: dict[str, Any] = {"max_batch": max_batch, "memory": memory, "background": background, "hooks": hooks}
        dia = cls(model, codec, codec_dtype=codec_dtype, **limits)
        dia.defaults = checkpoint.defaults
        dia._load_codec["local_files_only"] = local_files_only
        return dia

    @property
    def config(self) -> DiaConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights and activations."""
        return self.model.dtype

    @property
    def codec(self) -> "Codec":
        """The codec, loaded now if it was not.

        Raises:
            InputError: If there is none.
            CheckpointError: If it is no fit.
        """
        if self._codec is None:
            raise InputError("this Dia has no codec (codec=None): use generate_codes, or name one in from_pretrained")
        with self._making:
            codec = self._codec
            check_device(self.device)
            if isinstance(codec, str | os.PathLike):
                from dia_fast.audio.codec import load_codec

                codec = load_codec(os.fspath(codec), **self._load_codec)
            self._check_fit(codec)
            self._codec = codec
            return codec

    def _check_fit(self, codec: "Codec") -> None:
        decoder = self.config.decoder
        if codec.num_codebooks != decoder.num_channels or codec.codebook_size < decoder.eos_token_id:
            raise CheckpointError(
                f"the codec has {codec.num_codebooks} codebooks of {codec.codebook_size} codes, and the model speaks "
                f"{decoder.num_channels} channels of {decoder.eos_token_id}: they do not belong together"
            )

    @property
    def engine(self) -> Engine:
        """The engine that all calls share, made at first use.

        Raises:
            InputError: If its memory holds nothing.
        """
        with self._making:
            if self._engine is None:
                check_device(self.device)
                self._engine = Engine(self.model, hooks=self._hooks, **self._limits)
                if self._background:
                    self._engine.start()
            return self._engine

    def close(self) -> None:
        """Give the engine's memory back; a later call makes a new one.

        Whatever other threads are doing with it ends with `dia_fast.engine.Cancelled`.
        """
        with self._making:
            running, self._engine = self._engine, None
        if running is not None:
            running.close()

    def __enter__(self) -> "Dia":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        text: Texts,
        *,
        audio_prompt: Prompts = None,
        prompt_text: str | None = None,
        split: str | None = None,
        seed: Seeds = None,
        progress: Progress = False,
        speed: float = 1.0,
        trim_silence: bool = False,
        add_tag: bool = False,
        cut_prompt: bool = False,
        sampling_params: SamplingParams | None = None,
        **options: "Unpack[SamplingOptions]",
    ) -> Audio | list[Audio]:
        """Speak a text, or each text of a list in one batch.

        Args:
            text: a transcript with speaker tags, `"[S1] ... [S2] ..."`, or a list of them.
            audio_prompt: a voice to go on in: a `Voice` or its name (see `voice`), a path, an `Audio`, a pair
                `(samples, sample_rate)` or codes `[frames, channels]`. The text must begin with the words of the
                prompt, unless `prompt_text` or the voice gives them; the result holds the new words only. For a list
                of texts: one prompt for all, or a list with one for each (None for none).
            prompt_text: the words of the prompts.
            split: `"auto"` cuts a text that is too long for the model (some 20 s) into segments of about 9 s, speaks
                each in the voice of the prompt, or of what was spoken before, and joins them with a fade of 10 ms on
                either side. `max_new_tokens` then holds for each segment, and the seed for the first.
            seed: an int for all texts, or one for each; a text sounds the same alone and in a list. A name, such as
                `"Anna"`, stands for a seed of its own. None draws one for each text; it is in `Audio.seed`.
            progress: True for a bar on standard error, or a function that is called with the number of steps so far.
            speed: 0.25 to 4 times as fast, at the same pitch. Needs the extra `media`.
            trim_silence: cut silence at both ends, and to 0.4 s where it is longer than 0.7 s inside.
            add_tag: put `[S1]` before a text that begins without a speaker's tag.
            cut_prompt: take the part with the most speech, 10 to 20 s from pause to pause, of a recording that is
                longer. A warning names its seconds: `prompt_text` holds the words of that part.
            sampling_params: settings in the place of the checkpoint's (`Dia.defaults`, from generation_config.json).
            **options: fields of `SamplingParams`, in the place of either: `temperature=1.0`. `max_new_tokens` is cut to
                the positions that the prompt leaves.

        Returns:
            An `Audio`, or a list of them for a list of texts. `Audio.outcome` tells what became of each segment: one in
            which the model said nothing has been tried again `retries` times, with seeds derived from its own.

        Raises:
            InputError: before anything is computed, for a value that cannot be used.
        """
        params = params_for(self.config, self.defaults, sampling_params, **options)
        speed = checked_speed(speed)
        for name, value in {"trim_silence": trim_silence, "add_tag": add_tag, "cut_prompt": cut_prompt}.items():
            if not isinstance(value, bool):
                raise InputError(f"{name} must be True or False, not {shown(value)}")
        codec = self.codec
        if add_tag:
            tagged = [with_tag(item) for item in texts_of(text)]
            text = tagged if is_list(text) else tagged[0]
        if cut_prompt:
            audio_prompt = cut_prompts(audio_prompt)
        scripts = self._scripts(text, audio_prompt, prompt_text, split, params, seed)
        speak_scripts(self.engine, scripts, progress, codec)
        audios = [script.audio(codec) for script in scripts]
        audios = [at_speed(without_silence(audio) if trim_silence else audio, speed) for audio in audios]
        return audios if is_list(text) else audios[0]

    def generate_codes(
        self,
        text: Texts,
        *,
        audio_prompt: Prompts = None,
        prompt_text: str | None = None,
        split: str | None = None,
        seed: Seeds = None,
        progress: Progress = False,
        sampling_params: SamplingParams | None = None,
        **options: "Unpack[SamplingOptions]",
    ) -> list[Tensor]:
        """Speak as `generate` does, and return codes instead of sound. Needs no codec, unless a prompt is sound.

        Args:
            text: As in `generate`.
            audio_prompt: As in `generate`.
            prompt_text: As in `generate`.
            split: As in `generate`.
            seed: As in `generate`.
            progress: As in `generate`.
            sampling_params: As in `generate`.
            **options: As in `generate`.

        Returns:
            The codes of each text, `[frames, channels]` int64 on the CPU, always as a list.

        Raises:
            InputError: As in `generate`.
        """
        params = params_for(self.config, self.defaults, sampling_params, **options)
        scripts = self._scripts(text, audio_prompt, prompt_text, split, params, seed)
        speak_scripts(self.engine, scripts, progress)
        return [script.codes() for script in scripts]

    def stream(
        self,
        text: str | bytes,
        *,
        chunk_seconds: float = 0.5,
        first_chunk_seconds: float = streaming.FIRST_CHUNK_SECONDS,
        audio_prompt: AudioPrompt = None,
        prompt_text: str | None = None,
        split: str | None = None,
        seed: int | None = None,
        progress: Progress = False,
        sampling_params: SamplingParams | None = None,
        **options: "Unpack[SamplingOptions]",
    ) -> streaming.Stream:
        """Speak one text and yield the sound chunk by chunk, each as soon as it is certain.

        The chunks joined are the sound of `generate` for the same seed. Streams in several threads share a batch.
        Nothing happens between two chunks unless other threads use this Dia, or it was made with `background`. To give
        up early, leave the loop and `close()` the iterator (or drop it): the request ends and its memory is free.

        Args:
            text: as in `generate`, one of them. A script that `split="auto"` cuts is spoken segment by segment; with a
                voice the next one is begun while this one is heard.
            chunk_seconds: length of every chunk but the first and a segment's last, rounded to frames of 11.6 ms.
            first_chunk_seconds: length of the first one, if that is less. It comes when its own frames, 10 more that
                its samples depend on and the 15 steps of the delay pattern are done.
            audio_prompt: As in `generate`.
            prompt_text: As in `generate`.
            split: As in `generate`.
            seed: As in `generate`.
            progress: As in `generate`.
            sampling_params: As in `generate`.
            **options: As in `generate`.

        Raises:
            InputError: at once, as `generate` does; after the first chunk only what went wrong since, and then in this
                stream alone.
        """
        params = params_for(self.config, self.defaults, sampling_params, **options)
        sizes = (
            streaming.checked_seconds("chunk_seconds", chunk_seconds),
            streaming.checked_seconds("first_chunk_seconds", first_chunk_seconds),
        )
        one_text(text)
        progress_of(progress, 1)
        codec = self.codec
        [script] = self._scripts(text, audio_prompt, prompt_text, split, params, seed)
        return streaming.Stream(script, streaming.stream(self.engine, codec, script, *sizes, progress))

    def astream(
        self,
        text: str | bytes,
        *,
        chunk_seconds: float = 0.5,
        first_chunk_seconds: float = streaming.FIRST_CHUNK_SECONDS,
        audio_prompt: AudioPrompt = None,
        prompt_text: str | None = None,
        split: str | None = None,
        seed: int | None = None,
        sampling_params: SamplingParams | None = None,
        **options: "Unpack[SamplingOptions]",
    ) -> streaming.AsyncStream:
        """`stream` for asyncio: `async for chunk in dia.astream(text)`. Never blocks the event loop.

        Streams of one loop share a batch, and one thread that makes the steps. A task that is cancelled, or an iterator
        that is closed with `aclose()`, ends its request.

        Args:
            text: As in `stream`.
            chunk_seconds: As in `stream`.
            first_chunk_seconds: As in `stream`.
            audio_prompt: As in `generate`.
            prompt_text: As in `generate`.
            split: As in `generate`.
            seed: As in `generate`.
            sampling_params: As in `generate`.
            **options: As in `generate`.

        Raises:
            InputError: At once for a text or a setting, and with the first chunk for an audio prompt or the codec.
        """
        params = params_for(self.config, self.defaults, sampling_params, **options)
        sizes = (
            streaming.checked_seconds("chunk_seconds", chunk_seconds),
            streaming.checked_seconds("first_chunk_seconds", first_chunk_seconds),
        )
        [drawn] = seeds_of(seed, 1, params)
        ids_of(self.config, one_text(text))
        prompt_for_each(audio_prompt, 1, False)
        made: list[Script] = []

        def prepare() -> tuple[Engine, "Codec", Script]:
            running, codec = self.engine, self.codec
            made.extend(self._scripts(text, audio_prompt, prompt_text, split, params, drawn))
            return running, codec, made[0]

        async def chunks() -> AsyncGenerator[Audio, None]:
            prepared = await streaming.in_thread(prepare)
            async with aclosing(streaming.astream(*prepared, *sizes)) as given:
                async for chunk in given:
                    yield chunk

        return streaming.AsyncStream(made, chunks())

    def voice(self, source: str | os.PathLike[str] | Audio | tuple[Any, int], *, text: str | None = None) -> Voice:
        """Turn a recording into a voice, once: its codes are kept in memory and on disk.

        Give it as `audio_prompt`, without `prompt_text`. A saved voice can be given by its name as well.

        Args:
            source: A recording's path; a folder that holds one and its transcript; the name of a voice that `dia-fast
                voices add` has saved; an `Audio`, or a pair `(samples, sample_rate)`.
            text: What is said in it; by default the `.txt` file beside the recording.

        Raises:
            InputError: For a recording that cannot be used, or without a transcript.
        """
        if not isinstance(source, str | os.PathLike):
            if text is None:
                raise InputError("text: say what is said in the recording")
            [codes] = encode_prompts(self.config, [source], lambda: self.codec, self._prompt_codes)
            assert codes is not None
            return Voice(codes, checked_text(text).strip())
        path, said = recording_of(checked_path(source, "source"), text)
        codec = self.codec
        with self._making:
            if self._store is None:
                self._store = CodeStore(default_cache(), codec)
            stored, _ = self._store.codes(path, longest_prompt(self.config) / codec.frames_per_second)
        [codes] = encode_prompts(self.config, [stored], lambda: codec)
        assert codes is not None
        return Voice(codes, said)

    def forward_logits(self, text: Texts, delayed_codes: Any, *, guidance: bool = True) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: the logits that follow each of the given steps, for research and comparisons.

        Args:
            text: One, or a list of `batch`.
            delayed_codes: Integers `[batch, steps, channels]` from step 0 on (all BOS), special codes included.
            guidance: Compute the unconditional logits, too.

        Returns:
            `(cond, uncond)`, each `[batch, steps, channels, vocab]` float32 on the model's device; without guidance
            uncond is None.

        Raises:
            InputError: For a value that cannot be used.
            NumericError: If a logit is NaN or infinite.
        """
        texts = texts_of(text)
        codes = checked_delayed_codes(self.config, delayed_codes, len(texts))
        if not isinstance(guidance, bool):
            raise InputError(f"guidance must be True or False, not {shown(guidance)}")
        found = self.model.forward_logits([ids_of(self.config, item) for item in texts], codes, guidance)
        for logits in found:
            if logits is not None and not bool(logits.isfinite().all()):
                index, step, channel = (~logits.isfinite()).nonzero()[0, :3].tolist()
                raise not_finite(f"text {index}, step {step}, channel {channel}")
        return found

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model, without the codec, in the transformers layout and in its present dtype.

        Args:
            folder: A new or an empty one.

        Returns:
            The folder.

        Raises:
            CheckpointError: If the folder is not empty, or cannot be written; nothing is left behind then.
        """
        return save_pretrained(os.fspath(folder), self.config, self.model.state_dict(), defaults=self.defaults)

    def __repr__(self) -> str:
        size = sum(math.prod(shape) for shape in fused_shapes(self.config).values())
        kind = str(self.dtype).removeprefix("torch.")
        return f"Dia({size:,} parameters, {kind} on {self.device}, {self.model.ops.name} ops)"

    def _scripts(
        self,
        text: Texts,
        prompts: Prompts,
        prompt_text: str | None,
        split: str | None,
        params: SamplingParams,
        seed: Seeds,
    ) -> list[Script]:
        """Turn the arguments of a call into scripts to be spoken, one for each text; every door goes through here."""
        texts = texts_of(text)
        seeds = seeds_of(seed, len(texts), params)
        for item in texts:
            ids_of(self.config, item)
        codes = self._codes(prompt_for_each(prompts, len(texts), is_list(text)))
        return make_scripts(self.config, texts, codes, prompt_text, split, params, seeds, self._rate())

    def _rate(self) -> float:
        """Frames per second: of the codec, or of Dia's own where none is loaded."""
        codec = self._codec
        return FRAMES_PER_SECOND if codec is None or isinstance(codec, str | os.PathLike) else codec.frames_per_second

    def _named(self, prompt: str) -> AudioPrompt:
        """The path of a recording as it is, or the saved voice of that name."""
        if checked_path(prompt).exists():
            return prompt
        if find_voice(prompt) is None:
            raise missing(prompt)
        return self.voice(prompt)

    def _codes(self, prompts: list[AudioPrompt]) -> list[Tensor | Voice | None]:
        """The codes of each prompt, as a voice where its text is known."""
        named = [self._named(item) if isinstance(item, str) else item for item in prompts]
        codes = encode_prompts(self.config, named, lambda: self.codec, self._prompt_codes)
        return [
            Voice(found, item.text) if isinstance(item, Voice) and found is not None else found
            for item, found in zip(named, codes, strict=True)
        ]
