"""transformers' processor for a checkpoint with a codec of its own, such as the demo voice.

`AutoProcessor` finds a codec by a name on the Hub or by an absolute path, which a folder that moves cannot tell, and
takes special ids and the sampling rate of Dia-1.6B for granted.
"""

import os
from typing import Any

import torch
from transformers import DacModel, DiaFeatureExtractor, DiaProcessor, DiaTokenizer

from dia_fast.audio.codec.load import codec_beside
from dia_fast.checkpoint.demo import located
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.errors import CheckpointError


class CheckpointProcessor(DiaProcessor):
    """A `DiaProcessor` whose defaults are those of a checkpoint; arguments of a call come before them."""

    defaults: dict[str, Any]

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        given = kwargs.get("audio_kwargs", {})
        merged: dict[str, dict[str, Any]] = super()._merge_kwargs(
            *args, **{name: value for name, value in self.defaults.items() if name not in given} | kwargs
        )
        return merged

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As one that `AutoProcessor` knows."""
        plain = DiaProcessor(self.feature_extractor, self.tokenizer, self.audio_tokenizer)
        return plain.save_pretrained(save_directory, push_to_hub, **kwargs)


def processor(model: str | os.PathLike[str]) -> CheckpointProcessor:
    """Load the processor of a checkpoint in a folder that has its codec in `codec` within.

    With `save_pretrained` of what is returned `AutoProcessor` finds the codec, too, as long as it stays where it is;
    special ids and the sampling rate have to be given to that one in each call.

    Args:
        model: The folder, or `"demo"`.

    Raises:
        CheckpointError: If it has no codec, or what it has cannot be loaded.
    """
    folder = located(model)
    codec = codec_beside(folder)
    if codec is None:
        raise CheckpointError(f"{folder} has no folder 'codec': use transformers' AutoProcessor for this model")
    config = open_checkpoint(folder).config
    tokenizer = DacModel.from_pretrained(codec.resolve(), dtype=torch.float32).eval()
    rate = tokenizer.config.sampling_rate
    made = CheckpointProcessor(
        DiaFeatureExtractor(sampling_rate=rate, hop_length=tokenizer.config.hop_length),
        DiaTokenizer(max_length=config.encoder.max_position_embeddings),
        tokenizer,
    )
    made.defaults = {
        "bos_token_id": config.decoder.bos_token_id,
        "eos_token_id": config.decoder.eos_token_id,
        "pad_token_id": config.decoder.pad_token_id,
        "delay_pattern": list(config.delay_pattern),
        "sampling_rate": rate,
    }
    return made
