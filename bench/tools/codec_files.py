"""Codec files as descript-audio-codec writes them."""

from pathlib import Path

import torch

from dia_fast.audio.codec import Codec
from dia_fast.audio.codec.weights import rename_official


def official_names(codec: Codec) -> dict[str, str]:
    """Official name -> transformers name, for every tensor of a network without weight norm."""
    config = codec.config
    stems = [
        f"encoder.block.{i}" for i in (0, len(config.downsampling_ratios) + 1, len(config.downsampling_ratios) + 2)
    ]
    stems += [f"decoder.model.{i}" for i in (0, len(config.upsampling_ratios) + 1, len(config.upsampling_ratios) + 2)]
    for half, blocks in (("encoder.block", config.downsampling_ratios), ("decoder.model", config.upsampling_ratios)):
        for block in range(1, len(blocks) + 1):
            for place in range(5):
                stems += [f"{half}.{block}.block.{place}"] + [
                    f"{half}.{block}.block.{place}.block.{i}" for i in range(4)
                ]
    quantizers = [name for name in codec.network.tensors() if name.startswith("quantizer.")]
    candidates = [f"{stem}.{end}" for stem in stems for end in ("weight", "bias", "alpha")] + quantizers
    renamed = rename_official({name: name for name in candidates}, config)
    return {str(old): new for new, old in renamed.items() if new in codec.network.tensors()}


def save_official(codec: Codec, path: Path, spelling: str, zipped: bool = True) -> Path:
    """Write the codec as a .pth file: weight norm "folded", or in its "old" or "parametrization" spelling."""
    ends = {
        "old": (".weight_g", ".weight_v"),
        "parametrization": (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    }.get(spelling)
    generator = torch.Generator().manual_seed(3)
    tensors = codec.network.tensors()
    state = {}
    for old, new in official_names(codec).items():
        tensor = tensors[new]
        if ends is None or not old.endswith(".weight") or "codebook" in old:
            state[old] = tensor
            continue
        norm = tensor.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        scale = torch.rand(norm.shape, generator=generator) + 0.5  # v may have any length
        stem = old.removesuffix(".weight")
        state |= {stem + ends[0]: norm, stem + ends[1]: tensor * scale}
    contents = {"state_dict": state, "metadata": {"kwargs": codec.config.to_official() | {"quantizer_dropout": 0.5}}}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    return path
