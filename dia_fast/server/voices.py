"""Names that requests may use for a voice."""

import json
import logging
import tempfile
import threading
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
from torch import Tensor

from dia_fast.audio.audio import Audio, load_audio
from dia_fast.audio.code_store import CodeStore, default_cache
from dia_fast.errors import InputError
from dia_fast.generation.prompts import encode_prompts, longest_prompt
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.generation.voices import NAME
from dia_fast.server.errors import ApiError
from dia_fast.text.tokenizer import ABSURD_BYTES, checked_text
from dia_fast.utils.files import LARGEST_TEXT, parse_json, read_regular, replacing

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec
    from dia_fast.model.config import DiaConfig

logger = logging.getLogger("dia_fast.server")

SHORTEST, LONGEST = 2.0, 35.0

OPENAI_VOICES = tuple("alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split())
"""Names that clients of the OpenAI API send, some of them no other."""


@dataclass(frozen=True)
class ServedVoice:
    """A voice by name.

    Args:
        name: As requests write it.
        kind: `"seed"` for one that is only a seed, `"recording"`, or `"builtin"`.
        path: Of its recording.
        codes: Of its recording, `[frames, channels]`.
        text: What is said in the recording.
        seed: For requests that name none.
        temperature: For requests that name none.
        speaker: Tag put in front of a text without tags.
    """

    name: str
    kind: str
    path: Path | None = None
    codes: Tensor | None = field(default=None, repr=False)
    text: str | None = None
    seed: int | None = None
    temperature: float | None = None
    speaker: str = "[S1]"
    created: int = 0


class Voices:
    """All voices of a server: those of every server, and the recordings of a folder.

    A voice of the folder is `name.wav` (or .flac, .ogg, .mp3), what is said in it as `name.txt`, and if need be
    `name.json` with `aliases`, `seed` and `temperature`. One named like a voice of OpenAI takes its place.

    Args:
        folder: Where recordings are; None for none.
        created: Unix time in seconds, of the voices of every server.
    """

    def __init__(self, folder: Path | None = None, created: int = 0) -> None:
        named = [ServedVoice("dialogue", "builtin"), ServedVoice("S1", "builtin")]
        named.append(ServedVoice("S2", "builtin", speaker="[S2]"))
        # A seed of its own makes a name sound alike for the same text, and mostly alike for others.
        named += [ServedVoice(name, "seed", seed=1 + index) for index, name in enumerate(OPENAI_VOICES)]
        self._builtin = {voice.name: replace(voice, created=created) for voice in named}
        self.folder = folder
        self._recorded: dict[str, ServedVoice] = {}
        self._aliases: dict[str, str] = {}
        self._config: DiaConfig | None = None
        self._store: CodeStore | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.all())

    def all(self) -> list[ServedVoice]:
        """In the order in which to show them: recordings first."""
        recorded = list(self._recorded.values())
        return recorded + [voice for name, voice in self._builtin.items() if name not in self._recorded]

    def get(self, name: str | None) -> ServedVoice:
        """The voice of a name; the one for dialogues without. Raises an error 400 for a name that is unknown."""
        if name is None:
            return self._builtin["dialogue"]
        name = self._aliases.get(name, name)
        found = self._recorded.get(name) or self._builtin.get(name) or self._of_file(name)
        if found is None:
            known = ", ".join(voice.name for voice in self.all()[:8])
            raise ApiError(
                400, f"voice {name!r:.80} is unknown; there are {known} and others: see /v1/audio/voices", param="voice"
            )
        return found

    def _of_file(self, name: str) -> ServedVoice | None:
        """The recording of a file name, `anna.wav`: what clients of Dia-TTS-Server send."""
        return next((voice for voice in self._recorded.values() if voice.path and voice.path.name == name), None)

    def open(self, config: "DiaConfig", codec: "Codec") -> None:
        """Read the folder.

        Raises:
            InputError: If it cannot be read.
        """
        self._config, self._store = config, CodeStore(default_cache(), codec)
        if self.folder is not None:
            if not self.folder.is_dir():
                raise InputError(f"voices: {self.folder} is not a folder")
            self.rescan()

    def rescan(self) -> None:
        """Look for recordings that have come, gone or changed; one that cannot be used is told in the log."""
        if self.folder is None or self._store is None:
            return
        with self._lock:
            found, aliases = dict[str, ServedVoice](), dict[str, str]()
            for path in sorted(self.folder.iterdir()):
                if path.suffix.lower() not in (".wav", ".flac", ".ogg", ".mp3") or path.name.startswith("."):
                    continue
                try:
                    voice, others = self._read(path)
                except (InputError, OSError) as error:  # of several replicas, another may remove it meanwhile
                    logger.error("voice %s cannot be used: %s", path.name, error)
                    continue
                found[voice.name] = voice
                aliases |= dict.fromkeys(others, voice.name)
            self._recorded, self._aliases = found, aliases

    def _read(self, path: Path) -> tuple[ServedVoice, list[str]]:
        assert self._config is not None and self._store is not None
        if not NAME.match(path.stem):
            raise InputError("its name must be of letters, digits, - and _")
        try:
            text = checked_text(read_regular(path.with_suffix(".txt"), ABSURD_BYTES)).strip()
        except OSError as error:
            told = f"what is said in it must be in {path.stem}.txt"
            raise InputError(f"{told}: {error.strerror or error}") from error
        more = self._more(path.with_suffix(".json"))
        codec = self._store.codec
        longest = min(LONGEST, longest_prompt(self._config) / codec.frames_per_second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes, _ = self._store.codes(path, longest)
        [checked] = encode_prompts(self._config, [codes], lambda: codec)
        params = SamplingParams().given(
            **{name: more[name] for name in ("seed", "temperature") if more.get(name) is not None}
        )
        voice = ServedVoice(
            path.stem,
            "recording",
            path=path,
            codes=checked,
            text=text,
            seed=params.seed,
            temperature=None if more.get("temperature") is None else params.temperature,
            created=int(path.stat().st_mtime),
        )
        aliases = more.get("aliases") or []
        if not isinstance(aliases, list) or not all(isinstance(name, str) for name in aliases):
            raise InputError(f"{path.stem}.json: aliases must be a list of names")
        return voice, aliases

    def _more(self, path: Path) -> dict[str, Any]:
        try:
            found = parse_json(read_regular(path, LARGEST_TEXT).decode(), str(path), InputError)
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path.name}: cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{path.name}: must be a JSON object")
        return found

    def add(self, name: str, data: bytes, text: str, seed: int | None = None) -> ServedVoice:
        """Keep a recording that was sent.

        Raises:
            ApiError: For a name that cannot be used.
            InputError: For a recording or a text that cannot be used.
        """
        assert self.folder is not None and self._store is not None
        if not NAME.match(name):
            raise ApiError(400, "name must be 1 to 64 letters, digits, - and _", param="name")
        text = checked_text(text).strip()
        if name in self._recorded or name in self._builtin and name not in OPENAI_VOICES:
            raise ApiError(409, f"there is a voice {name} already; delete it first", param="name", code="voice_exists")
        audio = Audio(decoded(data, self._store.codec.sample_rate), self._store.codec.sample_rate)
        with self._lock:
            path = self.folder / f"{name}.wav"
            if path.exists():
                raise ApiError(409, f"there is a file {path.name} already", param="name", code="voice_exists")
            with replacing(path.with_suffix(".txt")) as temporary:
                temporary.write_text(text, encoding="utf-8")
            if seed is not None:
                with replacing(path.with_suffix(".json")) as temporary:
                    temporary.write_text(json.dumps({"seed": seed}), encoding="utf-8")
            audio.save(path)
            try:
                voice, _ = self._read(path)
            except InputError:
                self._remove(path)
                raise
            self._recorded = {**self._recorded, name: voice}
        return voice

    def delete(self, name: str) -> None:
        """Remove a recording from the folder. Raises an error 404 or 403."""
        voice = self._recorded.get(name)
        if voice is None and name in self._builtin:
            raise ApiError(403, f"{name} belongs to the server and cannot be deleted")
        if voice is None or voice.path is None:
            raise ApiError(404, f"there is no voice {name!r:.80}", code="voice_not_found")
        with self._lock:
            self._remove(voice.path)
            self._recorded = {other: item for other, item in self._recorded.items() if other != name}
            self._aliases = {alias: other for alias, other in self._aliases.items() if other != name}

    def _remove(self, path: Path) -> None:
        for suffix in (path.suffix, ".txt", ".json"):
            path.with_suffix(suffix).unlink(missing_ok=True)


def decoded(data: bytes, sample_rate: int, param: str = "audio_sample") -> Any:
    """Samples of a recording that was sent. Raises an error 415 for what is not sound, 400 for its length."""
    with tempfile.NamedTemporaryFile(suffix=".audio") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.write(data)
        file.flush()
        try:
            with soundfile.SoundFile(file.name):
                pass
        except (soundfile.LibsndfileError, TypeError, RuntimeError) as error:
            message = "the recording cannot be decoded; wav, flac, ogg, mp3 and aiff work"
            raise ApiError(415, message, param=param, code="not_audio") from error
        try:
            return load_audio(file.name, sample_rate, min_seconds=MINIMUM[param], max_seconds=LONGEST)
        except InputError as error:
            raise ApiError(400, str(error).removeprefix(f"{file.name}: "), param=param) from None


MINIMUM = {"audio_sample": SHORTEST, "ref_audio": 0.02}
"""Shortest recording in seconds: one that is kept is to serve as a voice."""
