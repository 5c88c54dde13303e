"""Codes of recordings, computed once.

They are kept on disk under the SHA-256 of the audio file and of the codec's weights, so that neither a second run nor
a renamed file is encoded again, and a changed one is.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dia_fast.audio.audio import load_audio
from dia_fast.audio.codec import Codec
from dia_fast.errors import InputError
from dia_fast.utils.files import LARGEST_SOUND, read_regular, replacing

_RECENT = 64  # recordings whose codes stay in memory


def default_cache() -> Path:
    """Return the default folder of codes: `dia-fast/codes` in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dia-fast" / "codes"


class CodeStore:
    """Codes of audio files on disk, one small file each, that are read again instead of encoding again.

    The last ones are kept in memory as well.
    """

    def __init__(self, folder: Path, codec: Codec) -> None:
        self.folder, self.codec, self.codec_key = folder, codec, _codec_key(codec)
        self._recent: dict[str, Any] = {}

    def codes(self, audio: Path, max_seconds: float) -> tuple[Tensor, str]:
        """`(codes [frames, channels] int16, key of their content)`.

        Raises:
            InputError: As `load_audio` does.
        """
        try:
            key = hashlib.sha256(read_regular(audio, LARGEST_SOUND)).hexdigest()
        except FileNotFoundError:
            key = ""  # `load_audio` says so
        except OSError as error:
            raise InputError(f"{audio}: cannot be read: {error.strerror or error}") from error
        path = self.folder / self.codec_key[:16] / f"{key}.npy"
        stored = self._recent.get(key, self._read(path)) if key else None
        if stored is None:
            samples = load_audio(audio, self.codec.sample_rate, max_seconds=max_seconds)
            stored = self.codec.encode(samples).cpu().numpy().astype(np.int16)
            self._write(path, stored)
        while len(self._recent) >= _RECENT:
            self._recent.pop(next(iter(self._recent)), None)
        self._recent[key] = stored
        return torch.from_numpy(stored), key

    def _read(self, path: Path) -> Any:
        try:
            codes = np.load(io.BytesIO(read_regular(path, LARGEST_SOUND)), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None  # not there, or damaged: encoded again
        sound = codes.ndim == 2 and codes.dtype == np.int16 and codes.shape[1] == self.codec.num_codebooks
        return codes if sound and len(codes) else None

    def _write(self, path: Path, codes: Any) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep codes in {path.parent}: {error.strerror}; choose another folder") from error
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, codes)


def _codec_key(codec: Codec) -> str:
    """The SHA-256 of a codec: configuration and weights."""
    digest = hashlib.sha256(repr((codec.config, codec.dtype)).encode())
    for name, tensor in sorted(codec.network.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
