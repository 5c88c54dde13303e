"""The loaded model as requests see it: what they may ask for, who is served next, and when the server is ready."""

import asyncio
import base64
import binascii
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

import dia_fast
from dia_fast.audio.audio import Audio
from dia_fast.audio.editing import has_media
from dia_fast.checkpoint.demo import unknown_words_remark
from dia_fast.errors import InputError
from dia_fast.generation.inputs import params_for
from dia_fast.generation.long_form import make_scripts
from dia_fast.generation.prompts import encode_prompts
from dia_fast.generation.sampling_params import CHECKPOINT, SamplingParams, random_seed
from dia_fast.server import encoders
from dia_fast.server.driver import Driver
from dia_fast.server.encoders import FORMATS
from dia_fast.server.errors import ApiError, overloaded
from dia_fast.server.metrics import Metrics
from dia_fast.server.options import Options
from dia_fast.server.queueing import Gate
from dia_fast.server.schemas import SpeechOptions, TextReport, VoiceId, extras
from dia_fast.server.speech import Plan, Speech, Workshop
from dia_fast.server.voices import ServedVoice, Voices, decoded
from dia_fast.text.tokenizer import TAG, checked_text, spoken_seconds, text_warnings

if TYPE_CHECKING:
    from dia_fast.api import Dia

logger = logging.getLogger("dia_fast.server")

ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
State = Literal["loading", "ready", "draining", "failed"]
_SAMPLING = ("max_new_tokens", "guidance_scale", "temperature", "top_p")


class Service:
    """One model behind HTTP.

    Args:
        options: What the operator chose.
        load: Makes the `Dia`, in a thread.
    """

    def __init__(self, options: Options, load: "Callable[[], Dia]") -> None:
        self.options, self._load = options, load
        self._stop: Callable[[], None] = lambda: None
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.metrics, self.voices = Metrics(), Voices(options.voices, options.started)
        self.active: set[Speech] = set()
        workers = max(1, min(4, (os.cpu_count() or 2) // 2))
        self._sound = ThreadPoolExecutor(workers, "dia-fast-sound")
        self._preparing = ThreadPoolExecutor(2, "dia-fast-prepare")
        self.gate = Gate(options.max_batch, options.max_queue)
        self._dia: Dia | None = None
        self._shop: Workshop | None = None

    # Life

    async def load(self) -> None:
        """Load the model; from then on requests are served."""
        loop = asyncio.get_running_loop()
        try:
            self._dia = dia = await loop.run_in_executor(self._preparing, self._loaded)
        except Exception as error:
            self.state, self.failure = "failed", error
            self._stop()
            return
        dia.engine.on_event = self.metrics.heard
        driver = Driver(dia.engine, loop, self.metrics.stepped)
        self.gate.capacity = self.gate.free = dia.engine.state.sizes.batch
        self._shop = Workshop(
            driver, self.gate, dia.codec, self._sound, self.metrics, slow_seconds=self.options.slow_seconds
        )
        self._watch(dia)
        if self.state == "loading":
            self.state = "ready"
            logger.info("ready: %s, %s", self.options.served_name, dia)

    def _loaded(self) -> "Dia":
        dia = self._load()
        dia.codec, dia.engine  # noqa: B018 - made now, not for the first request
        encoders.warm_up()
        self.voices.open(dia.config, dia.codec)
        for name in self.options.preload:
            self.voices.get(name)
        return dia

    def _watch(self, dia: "Dia") -> None:
        metrics, gate, state = self.metrics, self.gate, dia.engine.state
        metrics.watch("waiting", "requests that wait to run", lambda: gate.waiting)
        metrics.watch("running", "sequences that run", lambda: gate.capacity - gate.free)
        metrics.watch("active", "responses under way", lambda: len(self.active))
        metrics.watch("swapped", "sequences swapped out for lack of pages", lambda: dia.engine.stats.swapped)
        metrics.watch("pages", "pages of keys and values in use", lambda: state.pool.pages - state.pool.free)
        metrics.watch("pages_total", "pages of keys and values", lambda: state.pool.pages)
        metrics.watch("voices", "voices", lambda: len(self.voices))
        metrics.build_info(
            version=dia_fast.__version__,
            model=self.options.served_name,
            device=str(dia.device),
            dtype=str(dia.dtype).removeprefix("torch."),
            ops=dia.model.ops.name,
        )

    def on_failure(self, stop: Callable[[], None]) -> None:
        """Have `stop` called when loading fails; `failure` has the error then."""
        self._stop = stop

    def drain(self) -> None:
        """Take no new requests."""
        if self.state != "failed":
            self.state = "draining"

    def cancel_all(self) -> None:
        """End everything that is under way."""
        for speech in self.active:
            speech.cancel()

    async def close(self) -> None:
        """End everything and give the memory back."""
        self.cancel_all()
        if self._shop is not None:
            await asyncio.to_thread(self._shop.driver.stop)
        if self._dia is not None:
            self._dia.close()
        self._sound.shutdown(wait=False, cancel_futures=True)
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def check_open(self) -> None:
        """Raise an error 503 unless requests are served."""
        self.dia  # noqa: B018 - raises

    @property
    def dia(self) -> "Dia":
        """The model. Raises an error 503 unless requests are served."""
        if self._dia is None or self.state == "loading":
            raise overloaded("the model is being loaded", "loading", 5)
        if self.state != "ready":
            raise overloaded("the server is shutting down", "draining", 10)
        return self._dia

    @property
    def defaults(self) -> SamplingParams:
        """Sampling parameters of a request that names none; those of Dia's authors while the model is being loaded."""
        return SamplingParams() if self._dia is None else self._dia.defaults

    @property
    def is_demo(self) -> bool:
        """True if the demo voice of the package is served, which knows few words."""
        return self.options.demo

    # Requests

    async def prepared(self, body: SpeechOptions, text: str, voice: ServedVoice | None = None) -> Plan:
        """Check a request; `voice` stands in for the one it names.

        Raises:
            ApiError: For a request that cannot be served.
            InputError: For a text or a parameter that cannot be used.
        """
        dia = self.dia
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, self._prepare, dia, body, text, voice)

    async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what takes time in a thread."""
        self.check_open()
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *args)

    def start(self, plan: Plan) -> Speech:
        """Speak it, from now on."""
        self.check_open()
        assert self._shop is not None
        speech = Speech(self._shop, plan)
        self.active.add(speech)
        speech.task.add_done_callback(lambda _: self.active.discard(speech))
        return speech

    def check_model(self, name: str | None) -> None:
        """Raise an error 404 for a model that is not here."""
        if name is not None and name not in (self.options.served_name, *ALIASES):
            served = f"this server has {self.options.served_name} (also as {', '.join(ALIASES)})"
            raise ApiError(404, f"model {name!r:.80} is unknown: {served}", param="model", code="model_not_found")

    def _prepare(self, dia: "Dia", body: SpeechOptions, text: str, given: ServedVoice | None) -> Plan:
        self.check_model(body.model)
        told = []
        form = FORMATS[body.response_format]
        if (form.name == "aac" or body.speed != 1) and not has_media():
            what, name = ("aac", "response_format") if form.name == "aac" else ("a speed other than 1", "speed")
            raise ApiError(
                400,
                f'{what} needs PyAV, which this server lacks: pip install "dia-fast[media]"',
                param=name,
                code="unsupported_format",
            )
        rate = form.rate_for(dia.codec.sample_rate, body.sample_rate)
        voice = given or self.voices.get(body.voice.id if isinstance(body.voice, VoiceId) else body.voice)
        text = checked_text(text).strip()
        if not TAG.search(text):
            text = f"{voice.speaker} {text}"
        codes, prompt_text = self._prompt(dia, body, voice)
        seed, params = self._sampling(dia, body, voice)
        split = None if body.split == "none" else "auto"
        fps = dia.codec.frames_per_second
        [script] = make_scripts(dia.config, [text], [codes], prompt_text, split, params, [seed], fps)
        told += script.remarks
        if self.is_demo and (remark := unknown_words_remark(text)):
            told.append(remark)
        if body.instructions:
            told.append("instructions: ignored, Dia takes none; write sounds as (laughs) into the text")
        if unread := extras(body):
            told.append(f"unknown fields: {', '.join(name[:40] for name in unread[:8])}")
        seeded = voice.seed is not None or body.seed not in (None, -1)
        return Plan(
            script, form, rate, body.speed, (body.first_chunk_seconds, body.chunk_seconds), voice.name, seeded, told
        )

    def _prompt(self, dia: "Dia", body: SpeechOptions, voice: ServedVoice) -> tuple[Tensor | None, str | None]:
        if body.ref_audio is None:
            if body.ref_text is not None:
                raise ApiError(400, "ref_text needs ref_audio: the recording in which it is said", param="ref_text")
            return voice.codes, voice.text
        if body.voice is not None:
            raise ApiError(400, "give a voice or ref_audio, not both", param="ref_audio")
        if not body.ref_text:
            raise ApiError(400, "ref_audio needs ref_text: what is said in the recording", param="ref_text")
        return encode_recording(dia, from_data_url(body.ref_audio)), body.ref_text

    def _sampling(self, dia: "Dia", body: SpeechOptions, voice: ServedVoice) -> tuple[int, Any]:
        given = {name: getattr(body, name) for name in _SAMPLING}
        if given["temperature"] is None:
            given["temperature"] = voice.temperature
        values: dict[str, Any] = {name: CHECKPOINT if value is None else value for name, value in given.items()}
        if body.top_k is not None:
            values["top_k"] = body.top_k or None
        params = params_for(dia.config, dia.defaults, **values)
        seed = voice.seed if body.seed is None else body.seed
        return random_seed() if seed in (None, -1) else int(seed or 0), params

    def report(self, text: str, prompt_text: str | None = None) -> TextReport:
        """Tell facts about a text before it is spoken."""
        try:
            found = checked_text(text)
            told = text_warnings(found, max_length=1 << 17) if TAG.search(found) else text_warnings(f"[S1] {found}")
            told = [line for line in told if not line.startswith("the text is about") or "below" in line]
            if self.is_demo:
                remark = unknown_words_remark(found, most=8)
                told = [line for line in told if "sounds unnatural" not in line]
                told += [remark] if remark else []
            return TextReport(bytes=len(found.encode()), seconds=spoken_seconds(found), warnings=told)
        except InputError as error:
            return TextReport(bytes=len(text.encode("utf-8", "replace")), seconds=0, warnings=[], error=str(error))


def require_uploads(options: Options) -> None:
    """Raise an error 403 unless voices may be changed."""
    if not options.uploads:
        raise ApiError(403, "voices of this server are fixed: it was started without --uploads", code="uploads_off")


def from_data_url(url: str) -> bytes:
    """The contents of a base64 data: URL; nothing is ever fetched. Raises an error 400."""
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ApiError(
            400, "ref_audio must be a data: URL in base64, as data:audio/wav;base64,...; no others", param="ref_audio"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "ref_audio: the data: URL is not base64", param="ref_audio") from None


def encode_recording(dia: "Dia", data: bytes) -> Tensor:
    """The codes of a recording. Raises an error 415 for what is not sound, InputError for its length."""
    audio = Audio(decoded(data, dia.codec.sample_rate, "ref_audio"), dia.codec.sample_rate)
    [codes] = encode_prompts(dia.config, [audio], lambda: dia.codec)
    assert codes is not None
    return codes
