"""The small voice that comes with the package: a whole Dia that speaks a closed list of words, for demos and tests.

How it was made, and how well it is understood, is in the model card beside its weights; `examples/demo_voice` makes it.
"""

import difflib
import os
import re
from pathlib import Path

from dia_fast.errors import CheckpointError, InputError
from dia_fast.text.tokenizer import TAG

DEMO = "demo"
"""The name of the demo voice where a model is asked for; a folder of that name is `./demo`."""

TEMPERATURE = 0.5
"""At which the demo voice is understood best."""

_ALIKE = 0.55  # of two words that are alike, 0 to 1 as difflib counts it
_SOUND_OR_WORD = re.compile(r"\([^()\d]{1,40}\)|(?:[^\W_]|')+")
_FOLDER = Path(__file__).parent.parent / "demo-voice"  # no module's name: `dia_fast.demo_voice` is the function below


def demo_voice() -> Path:
    """The folder of the demo voice: a checkpoint in the layout of transformers, its codec in `codec` within.

        Dia.from_pretrained(demo_voice()).generate("[S1] Please open the red door.")

    Raises CheckpointError if the package was installed without it.
    """
    if not (_FOLDER / "model.safetensors").is_file():
        raise CheckpointError(f"the demo voice is missing from this installation: there is no {_FOLDER}")
    return _FOLDER


def located(model: str | os.PathLike[str]) -> str:
    """The name of a model, or for `"demo"` the folder of the demo voice.

    Raises:
        CheckpointError: If that is missing.
    """
    if not os.fspath(model):
        raise InputError("name_or_path must be a Hub repository or a path, not ''")
    return str(demo_voice()) if os.fspath(model) == DEMO else os.fspath(model)


def vocabulary() -> list[str]:
    """The words that the demo voice can say, in lower case."""
    return (demo_voice() / "vocabulary.txt").read_text(encoding="utf-8").split()


def unknown_words(text: str) -> list[str]:
    """The words of a transcript that the demo voice never learnt, each once, as they are written.

    It learnt no sounds: one in brackets, as in `(laughs)`, is told as it stands.
    """
    spoken, known = TAG.sub(" ", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"), set(vocabulary())
    found = list[str]()
    for part in _SOUND_OR_WORD.findall(spoken):
        word = part if part.startswith("(") else part.strip("'")
        if word and word.lower() not in known:
            found.append(word)
    return list(dict.fromkeys(found))


def nearest_words(word: str, most: int = 2) -> list[str]:
    """The words of the demo voice that are spelled most like this one, the nearest first; none if none is alike."""
    if word.startswith("("):
        return []
    return difflib.get_close_matches(word.lower(), vocabulary(), most, _ALIKE)


def unknown_words_remark(text: str, most: int = 5) -> str | None:
    """The remark on the words of a transcript that the demo voice never learnt, with its nearest; None if it knows all.

    Args:
        text: A transcript.
        most: Words that are named; of others the number is told.
    """
    if not (unknown := unknown_words(text)):
        return None
    named = [
        f"{word} (nearest: {', '.join(near)})" if (near := nearest_words(word)) else word for word in unknown[:most]
    ]
    more = f" and {len(unknown) - most} more" if len(unknown) > most else ""
    return f"the demo voice never learnt: {', '.join(named)}{more}"
