"""Finding a codec by name: a folder, a file, a repository on the Hub, or the original package."""

import os
import re
from pathlib import Path
from types import ModuleType

import torch

from dia_fast.audio.codec.codec import Codec, build_codec
from dia_fast.audio.codec.weights import CONFIG, PREPROCESSOR, WEIGHTS, read_codec_files
from dia_fast.checkpoint import hub
from dia_fast.checkpoint.adapters import base_of, is_adapter
from dia_fast.checkpoint.demo import located
from dia_fast.errors import CheckpointError, InputError, shown
from dia_fast.model.device import choose_device
from dia_fast.utils.ambient import isolated
from dia_fast.utils.files import checked_path

DESCRIPT = "descript"
AUTO = "auto"
OFFICIAL_CODEC = "descript/dac_44khz"


def codec_for(model: str | os.PathLike[str], codec: str | os.PathLike[str] = AUTO) -> str:
    """The name of a codec; for `"auto"` the folder `codec` beside the model's weights, else the official models'.

    The codec of an adapter is that of its base.
    """
    if codec != AUTO:
        return os.fspath(codec)
    folder = codec_beside(model)
    return OFFICIAL_CODEC if folder is None else str(folder)


def codec_beside(model: str | os.PathLike[str]) -> Path | None:
    """The folder `codec` beside a model's weights, or None.

    Args:
        model: A folder, a file of weights, an adapter, a name.
    """
    path = checked_path(located(model), "model")
    folder = path.parent if path.is_file() else path
    if (folder / "codec").is_dir():
        return folder / "codec"
    return codec_beside(base_of(folder)) if is_adapter(folder) else None


@isolated()
def load_codec(
    name_or_path: str | os.PathLike[str] = OFFICIAL_CODEC,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    ops: ModuleType | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Codec:
    """Load a DAC codec.

    Args:
        name_or_path: A folder in the transformers layout; a `.pth` file of descript-audio-codec; a repository on the
            Hugging Face Hub; `"descript"` for the original `dac` package with the weights it downloads,
            `"descript:FILE"` with others.
        device: Of the codec.
        dtype: Of its weights and activations.
        ops: An op set of `dia_kernels` for the activations; the torch reference by default.
        revision: Branch, tag or commit on the Hub.
        local_files_only: Do not go online.

    Raises:
        CheckpointError: For files that are missing, damaged, unsafe or do not fit together, and if `dac` is not
            installed where it is asked for.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"the codec must be a name or a path, not {shown(name_or_path)}")
    name, device = os.fspath(name_or_path), choose_device(device)
    if name == DESCRIPT or name.startswith(DESCRIPT + ":"):
        from dia_fast.audio.codec.descript import load_descript

        return load_descript(name.removeprefix(DESCRIPT).removeprefix(":") or None, device, dtype)
    path = checked_path(name, "codec")
    if not path.exists():
        path = _download(name, revision, local_files_only)
    config, tensors = read_codec_files(path)
    return build_codec(config, tensors, name, device, dtype, ops)


def _download(name: str, revision: str | None, local_files_only: bool) -> Path:
    """The folder of a snapshot that holds the codec's files."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(
            f"{name}: no such file or folder, and not the name of a repository (such as descript/dac_44khz) either"
        )
    files = [CONFIG, PREPROCESSOR, WEIGHTS]
    return hub.download_files(name, files, revision=revision, local_files_only=local_files_only)
