"""The codec of the original package (`pip install dia-fast[dac]`), behind the same interface as the native one."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_fast.audio.codec.codec import Codec
from dia_fast.audio.codec.config import CodecConfig
from dia_fast.audio.codec.weights import fold_weight_norm, rename_official
from dia_fast.checkpoint.tensor_io import check_stored, load_pickle
from dia_fast.errors import CheckpointError
from dia_fast.utils.files import checked_path


class DescriptNetwork(nn.Module):
    """Lets a `dac.DAC` be called as a `DacNetwork`."""

    def __init__(self, model: Any, config: CodecConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def encode(self, samples: Tensor) -> Tensor:
        return self.model.encode(samples)[1]

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(self.model.quantizer.from_codes(codes)[0])

    def tensors(self) -> dict[str, Tensor]:
        return fold_weight_norm(rename_official(self.model.state_dict(), self.config), Path("descript-audio-codec"))


def load_descript(weights: str | os.PathLike[str] | None, device: torch.device, dtype: torch.dtype) -> Codec:
    """A `dac.DAC` with the weights of a file, or with those of the 44.1 kHz release, which `dac` downloads and caches.

    The file is read here, as data only: `dac` itself would run the code of a file that brings some.
    Raises CheckpointError if the package is missing or the file is not one of its own.
    """
    try:
        import dac
        from dac.utils import download
    except ImportError as error:
        raise CheckpointError(
            f'codec="descript" needs the package descript-audio-codec ({error}): pip install "dia-fast[dac]", or leave '
            "the codec at its default, which needs nothing"
        ) from error
    path = checked_path(weights, "codec") if weights is not None else _downloaded(download)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a .pth file of descript-audio-codec is needed")
    contents = load_pickle(path)
    try:
        config = CodecConfig.from_official(contents["metadata"]["kwargs"])
        check_stored(contents["state_dict"], path)
        with torch.device("meta"):  # spares it drawing random weights
            model = dac.DAC(**config.to_official())
        model.load_state_dict(contents["state_dict"], assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit descript-audio-codec: {error}") from error
    return Codec(DescriptNetwork(model, config), config, device, dtype)


def _downloaded(download: Any) -> Path:
    try:
        return Path(download(model_type="44khz"))
    except Exception as error:  # whatever the network and its libraries raise
        raise CheckpointError(f"descript-audio-codec could not download its 44.1 kHz weights: {error}") from error
