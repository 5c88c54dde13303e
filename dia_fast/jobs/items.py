"""The lines of a batch file, checked one by one: a bad one is reported and the others go on."""

import difflib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from dia_fast.audio.audio import FORMATS
from dia_fast.errors import InputError
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.generation.voices import find_voice, missing
from dia_fast.text.tokenizer import ABSURD_BYTES, checked_text
from dia_fast.utils.files import LARGEST_SOUND, LARGEST_TEXT, open_regular, read_regular

SAMPLING_FIELDS = ("max_new_tokens", "guidance_scale", "temperature", "top_p", "top_k", "do_sample", "retries")
FIELDS = ("id", "text", "prompt", "prompt_text", "seed", "split", *SAMPLING_FIELDS)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OF_MODELS = (".json", ".safetensors", ".bin", ".pt", ".pth")
_Prompt: TypeAlias = tuple[Path, str | None, str]  # a recording, what is said in it if that is known, its SHA-256
_LONGEST_LINE = 16 * ABSURD_BYTES  # JSON may take six bytes for one, and there are two texts


@dataclass(frozen=True)
class Item:
    """One script.

    Args:
        line: Its number, from 1.
        split: Whether it may be cut into segments.
        file: Its name in the folder.
        params: With the seed.
        described: The sampling parameters and options as the manifest tells them.
        fingerprint: Of everything that the sound depends on.
        prompt_digest: SHA-256 of the recording, "" for none.
    """

    line: int
    id: str
    text: str
    prompt: Path | None
    prompt_text: str | None
    prompt_digest: str
    split: bool
    params: SamplingParams
    file: str
    described: dict[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Failed:
    """A line that cannot be used.

    Args:
        id: None if it is not known.
    """

    line: int
    id: str | None
    error: str


@dataclass(frozen=True)
class Defaults:
    """Values for lines that do not name their own.

    Args:
        params: Their seed is what the items' seeds come from.
        made_with: Model, codec and whatever else changes the sound, for the manifest.
        identity: What tells two versions of them apart, for the fingerprint only.
    """

    params: SamplingParams
    split: bool = True
    format: str = "wav"
    made_with: dict[str, Any] | None = None
    identity: str = ""


def item_seed(seed: int, identity: str) -> int:
    """The seed of an item without one: the first 32 bits of SHA-256 of "seed/id"."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{identity}".encode()).digest()[:4], "big")


def read_items(path: Path, defaults: Defaults) -> list[Item | Failed]:
    """The items of a JSON Lines file, and what is wrong with the lines that are none; blank lines are left out.

    Paths of prompts are relative to the folder of the file; where there is none, a saved voice is found by its name. An
    item without an id is called by its line's number, as in "00007".

    Raises:
        InputError: For a file that cannot be read, or holds nothing.
    """
    if "." + defaults.format not in FORMATS:
        raise InputError(f"unknown audio format {defaults.format!r}; supported: {', '.join(FORMATS)}")
    try:
        lines = read_regular(path, LARGEST_TEXT).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    found: list[Item | Failed] = []
    names: dict[str, int] = {}
    prompts: dict[str, _Prompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        identity = None
        try:
            fields = _fields(line)
            identity = _identity(fields, number)
            first = names.setdefault(identity.lower(), number)  # some file systems do not tell A from a
            if first != number:
                identity, twice = None, identity
                raise InputError(f"the id {twice!r} is that of line {first}: each item needs its own")
            found.append(_item(number, identity, fields, defaults, path.parent, prompts))
        except InputError as error:
            found.append(Failed(number, identity, str(error)))
    if not found:
        raise InputError(f'{path} is empty: write one item a line, as in {{"id": "a", "text": "[S1] Hello."}}')
    return found


def _fields(line: bytes) -> dict[str, Any]:
    if len(line) > _LONGEST_LINE:
        raise InputError(f"the line is {len(line)} bytes long; at most {_LONGEST_LINE} are taken for a script")
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f'a line must be an object such as {{"text": "[S1] Hello."}}, not {_shown(fields)}')
    for name in fields:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(FIELDS)}"
            raise InputError(f"unknown field {_shown(name)}: {hint}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the field {_shown(name)} is there twice")
    return dict(pairs)


def _identity(fields: dict[str, Any], number: int) -> str:
    value = fields.get("id")
    if value is None:
        return f"{number:05}"
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18:
        value = str(value)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InputError(
            f"id must be 1 to 100 letters, digits, dots, dashes and underscores, for it names the file, not "
            f"{_shown(value)}"
        )
    return value


def _item(
    number: int, identity: str, fields: dict[str, Any], defaults: Defaults, folder: Path, prompts: dict[str, _Prompt]
) -> Item:
    for name, kind in (
        ("text", "a text"),
        ("prompt", "a path, the name of a voice, or null"),
        ("prompt_text", "a text or null"),
    ):
        value = fields.get(name)
        if not isinstance(value, str) and (name == "text" or value is not None):
            raise InputError(f"{name} must be {kind}, not {_shown(value)}" if name in fields else "text is missing")
    seed = fields.get("seed")
    given = {name: fields[name] for name in SAMPLING_FIELDS if name in fields}
    base = defaults.params.seed or 0
    params = replace(defaults.params, **given, seed=item_seed(base, identity) if seed is None else seed)
    split = fields.get("split", "auto" if defaults.split else None)
    if split not in ("auto", None):
        raise InputError(f'split must be "auto" or null, not {_shown(split)}')
    text, prompt_text = checked_text(fields["text"]), fields.get("prompt_text")
    prompt, digest = None, ""
    if prompt_text is not None:
        checked_text(prompt_text)
        if fields.get("prompt") is None:
            raise InputError("prompt_text needs prompt: the recording in which it is said")
    if fields.get("prompt") is not None:
        name = fields["prompt"]
        if name not in prompts:
            prompts[name] = _prompt(name, folder)
        prompt, said, digest = prompts[name]
        prompt_text = said if prompt_text is None else prompt_text
    described = {name: value for name, value in asdict(params).items() if name != "seed"}
    described |= {"split": split, **(defaults.made_with or {})}
    if prompt is not None:
        described |= {"prompt": fields["prompt"], "prompt_text": prompt_text}
    file = f"{identity}.{defaults.format}"
    # The name of the recording does not matter, its contents do.
    heard = {**described, "prompt": digest, "text": text, "seed": params.seed, "file": file}
    fingerprint = hashlib.sha256((json.dumps(heard, sort_keys=True) + defaults.identity).encode()).hexdigest()[:32]
    return Item(
        number,
        identity,
        text,
        prompt,
        prompt_text,
        digest,
        # Where the transcript ends and the new words begin is not known without prompt_text.
        split == "auto" and (prompt is None or prompt_text is not None),
        params,
        file,
        described,
        fingerprint,
    )


def _prompt(name: str, folder: Path) -> _Prompt:
    """A recording by its path, or by the name of a saved voice, whose transcript is known, where there is no file."""
    path, said = folder / name, None
    if not os.path.lexists(path):
        if (voice := find_voice(name)) is None:
            raise missing(name)
        path, said = voice.path, voice.text
    return path, said, _digest(path)


def _digest(path: Path) -> str:
    try:
        digest = hashlib.sha256()
        with open_regular(path, LARGEST_SOUND) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the prompt {path}: {error.strerror or error}") from None


def identity_of(name: str | os.PathLike[str]) -> str:
    """Sizes and times of a local model's files, so that another one in its place is noticed; "" for other names.

    Of a folder only files that may be a model's count: sound that is written there changes nothing.
    """
    path = Path(name)
    files = sorted(file for file in path.rglob("*") if file.suffix in _OF_MODELS) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    return json.dumps([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]) if stats else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
