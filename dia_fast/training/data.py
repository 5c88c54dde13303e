"""Recordings and what is said in them: found, checked, turned into codes once, and put into an order.

Codes are kept on disk under the SHA-256 of the audio file and of the codec's weights, so that neither a second run nor
a renamed file is encoded again, and a changed one is.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dia_fast.audio.audio import FORMATS
from dia_fast.audio.code_store import CodeStore
from dia_fast.audio.codec import Codec
from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_fast.text.tokenizer import ABSURD_BYTES, TextWarning, encode_text, text_warnings
from dia_fast.training.batch import Example, check_example, longest_speech
from dia_fast.utils.files import LARGEST_TEXT, checked_path, parse_json, read_regular
from dia_fast.utils.warn import warn

SHOWN = 3  # sentences about data before "and n more"


@dataclass(frozen=True)
class Recording:
    """An audio file and its transcript.

    Args:
        where: What to call it in a message.
    """

    audio: Path
    text: str
    where: str


@dataclass(frozen=True)
class Dataset:
    """Examples to learn from.

    Args:
        digest: Of all audio, texts and the codec; equal data have equal digests.
    """

    examples: list[Example]
    digest: str

    def __len__(self) -> int:
        return len(self.examples)


def read_recordings(source: str | os.PathLike[str]) -> list[Recording]:
    """The recordings of a folder or of a JSONL file, in a fixed order.

    A folder: audio files at any depth (.wav, .flac, .ogg, .mp3), the transcript of `a.wav` beside it in `a.txt`. A
    JSONL file: one object a line with `audio`, a path relative to the file, and `text`.

    Raises:
        InputError: For a missing transcript, a line that is not such an object, or nothing at all.
    """
    path = checked_path(source, "data")
    if path.is_dir():
        found = _read_folder(path)
    elif path.is_file():
        found = _read_lines(path)
    else:
        raise InputError(f"{path}: no such file or folder; training needs a folder of audio and texts, or a JSONL file")
    if not found:
        raise InputError(f"{path}: nothing to train on: {_hint(path)}")
    return found


def load_dataset(
    recordings: Sequence[Recording],
    config: DiaConfig,
    codec: Codec,
    cache: Path,
    *,
    skip_bad: bool = False,
    hidden: bool = False,
) -> Dataset:
    """Check and encode recordings.

    Args:
        skip_bad: Leave such recordings out with a warning; only if all are bad it is an error.
        hidden: No progress bar.

    Raises:
        InputError: Naming the first that cannot be used, and why.
    """
    store = CodeStore(cache, codec)
    examples, digest, bad, doubts = [], hashlib.sha256(store.codec_key.encode()), [], []
    for recording in tqdm(recordings, desc="codes", unit="file", disable=hidden, leave=False, dynamic_ncols=True):
        try:
            example, key = _load(recording, config, store)
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{recording.where}: {error}") from None
            bad.append(f"{recording.where}: {error}")
            continue
        doubts += [f"{recording.where}: {doubt}" for doubt in text_warnings(recording.text, least_seconds=0)]
        digest.update(f"{key} {len(recording.text)} {recording.text}".encode())
        examples.append(example)
    _warn("left out", bad)
    _warn("transcripts", doubts)
    if not examples:
        raise InputError(f"nothing to train on: all {len(recordings)} recordings are unusable; the first is {bad[0]}")
    return Dataset(examples, digest.hexdigest())


def split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide into `(training, held out)`: at least one example is held out unless share is 0 or there is only one."""
    count = 0 if share == 0 or len(dataset) < 2 else min(max(1, round(share * len(dataset))), len(dataset) - 1)
    order = permutation(len(dataset), seed, "held out")
    held_out = set(order[:count])
    return (
        Dataset([example for i, example in enumerate(dataset.examples) if i not in held_out], dataset.digest),
        Dataset([dataset.examples[i] for i in sorted(held_out)], dataset.digest),
    )


def drawn(count: int, first: int, last: int, seed: int) -> list[int]:
    """Draw `first` to `last` (exclusive) of an endless sequence over `count` examples, shuffled anew in each epoch.

    A pure function of its arguments: a run that is resumed draws on as if nothing had happened.
    """
    orders = {epoch: permutation(count, seed, f"epoch {epoch}") for epoch in range(first // count, -(-last // count))}
    return [orders[draw // count][draw % count] for draw in range(first, last)]


def permutation(count: int, seed: int, purpose: str) -> list[int]:
    """`range(count)` shuffled, the same way for the same seed and purpose."""
    return torch.randperm(count, generator=generator(seed, purpose), dtype=torch.int64, device="cpu").tolist()


def generator(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of their own for every seed and purpose, on the CPU."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _load(recording: Recording, config: DiaConfig, store: CodeStore) -> tuple[Example, str]:
    limit = config.encoder.max_position_embeddings
    text = encode_text(recording.text, max_length=limit + 1)
    if len(text) > limit:
        raise InputError(f"the transcript has more than the {limit} bytes that the model reads: split the recording")
    longest = longest_speech(config)
    seconds = longest * store.codec.hop_length / store.codec.sample_rate
    codes, key = store.codes(recording.audio, seconds)
    example = Example(text, codes)
    check_example(example, config)
    return example, key


def _read_folder(folder: Path) -> list[Recording]:
    found = []
    for audio in sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS and path.is_file()):
        transcript = audio.with_suffix(".txt")
        if not transcript.is_file():
            raise InputError(f"{audio} has no transcript: write what is said in it to {transcript}")
        try:
            text = read_regular(transcript, ABSURD_BYTES).decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{transcript}: cannot be read as UTF-8 text: {error}") from error
        found.append(Recording(audio, text, str(audio)))
    return found


def _read_lines(path: Path) -> list[Recording]:
    found = []
    try:
        lines = read_regular(path, LARGEST_TEXT).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = parse_json(line, where, InputError)
        except InputError as error:
            raise InputError(f'{error}; expected {{"audio": "a.wav", "text": "[S1] ..."}}') from None
        for name in ("audio", "text"):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str) or not entry[name].strip():
                raise InputError(f'{where}: no "{name}"; expected {{"audio": "a.wav", "text": "[S1] ..."}}')
        found.append(Recording(path.parent / os.path.expanduser(entry["audio"]), entry["text"].strip(), where))
    return found


def _hint(path: Path) -> str:
    if path.is_dir():
        return f"the folder holds no {', '.join(FORMATS)}"
    return 'the file is empty; each line is to be {"audio": "a.wav", "text": "[S1] ..."}'


def _warn(about: str, sentences: list[str]) -> None:
    if sentences:
        more = f"; and {len(sentences) - SHOWN} more" if len(sentences) > SHOWN else ""
        warn(f"{about}: {'; '.join(sentences[:SHOWN])}{more}", TextWarning)
