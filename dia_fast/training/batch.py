"""Texts and codes become a batch: the delayed delayed_codes as input, the same delayed_codes one row later as labels.

The tensors are those that transformers' `DiaProcessor` makes with `generation=False, output_labels=True`: speech ends
with EOS in every channel, shorter items are padded on the left of the delayed_codes and on the right of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_fast.utils.ambient import isolated

IGNORED = -100  # a label that does not count, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Example:
    """A text and how it is spoken.

    Args:
        text: Ids, see `tokenizer.encode_text`.
        codes: `[frames, channels]` integer.
    """

    text: Sequence[int]
    codes: Tensor


@dataclass(frozen=True)
class Batch:
    """Examples that the model learns from at a time, all on one device.

    Args:
        text: `[batch, length]` int64, 0 where `text_mask` is False.
        text_mask: `[batch, length]` bool.
        delayed_codes: `[batch, steps, channels]` int64, the decoder's input.
        step_mask: `[batch, steps]` bool, False on the left of shorter items.
        labels: `[batch, steps, channels]` int64, the code that follows each, `IGNORED` for BOS and PAD.
    """

    text: Tensor
    text_mask: Tensor
    delayed_codes: Tensor
    step_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def counts(self) -> Tensor:
        """The number of labels that count in each channel: `[channels]` int64."""
        return (self.labels >= 0).sum((0, 1))


def longest_speech(config: DiaConfig) -> int:
    """The most frames that an example may have: with BOS, EOS and the delays they fill the decoder's positions."""
    return config.decoder.max_position_embeddings - max(config.delay_pattern) - 1


def check_example(example: Example, config: DiaConfig) -> None:
    """Raise InputError if the model cannot learn from an example, saying what is wrong with it."""
    decoder, codes = config.decoder, example.codes
    longest = longest_speech(config)
    if not 1 <= len(example.text) <= config.encoder.max_position_embeddings:
        raise InputError(
            f"the text has {len(example.text)} bytes; the model reads 1 to {config.encoder.max_position_embeddings}"
        )
    if not all(0 < byte < config.encoder.vocab_size for byte in example.text):
        raise InputError(f"the text holds ids outside 1..{config.encoder.vocab_size - 1}")
    if codes.ndim != 2 or codes.shape[1] != decoder.num_channels or codes.is_floating_point():
        raise InputError(
            f"codes must be integers of shape [frames, {decoder.num_channels}], not {codes.dtype} {list(codes.shape)}"
        )
    if not 1 <= len(codes) <= longest:
        raise InputError(f"the speech has {len(codes)} frames; the model can learn from 1 to {longest}: split it")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= decoder.eos_token_id:
        bad = low if low < 0 else high
        raise InputError(f"the codes hold {bad}; codes of sound go from 0 to {decoder.eos_token_id - 1}")


@isolated()
def build_batch(examples: Sequence[Example], config: DiaConfig) -> Batch:
    """Build a batch on the CPU.

    Args:
        examples: One or more; shorter ones are padded.
        config: Of the model.

    Raises:
        InputError: If there is no example, or if one cannot be used, naming its index.
    """
    if not examples:
        raise InputError("a batch needs at least one example")
    for index, example in enumerate(examples):
        try:
            check_example(example, config)
        except InputError as error:
            raise InputError(f"example {index}: {error}") from None
    decoder, delay = config.decoder, config.delay_pattern
    text = torch.zeros(len(examples), max(len(example.text) for example in examples), dtype=torch.int64, device="cpu")
    text_mask = torch.zeros_like(text, dtype=torch.bool)
    longest = max(len(example.codes) for example in examples)
    delayed_codes = torch.full(
        (len(examples), longest + 2 + max(delay), len(delay)), decoder.pad_token_id, dtype=torch.int64, device="cpu"
    )
    step_mask = torch.ones(delayed_codes.shape[:2], dtype=torch.bool, device="cpu")
    for item, example in enumerate(examples):
        text[item, : len(example.text)] = torch.tensor(example.text, dtype=torch.int64, device="cpu")
        text_mask[item, : len(example.text)] = True
        frames = len(example.codes)
        step_mask[item, : longest - frames] = False
        for channel, late in enumerate(delay):
            first = longest - frames + 1 + late
            delayed_codes[item, :first, channel] = decoder.bos_token_id
            delayed_codes[item, first : first + frames, channel] = example.codes[:, channel]
            delayed_codes[item, first + frames, channel] = decoder.eos_token_id
    labels = delayed_codes[:, 1:].clone()
    labels[(labels == decoder.bos_token_id) | (labels == decoder.pad_token_id)] = IGNORED
    return Batch(text, text_mask, delayed_codes[:, :-1], step_mask[:, :-1], labels)


@isolated()
def drop_conditions(batch: Batch, probability: float, generator: torch.Generator) -> Batch:
    """Take the text from some items, each with `probability`, so that the model learns what guidance starts from.

    An item without its text reads zeros, as many as the text has bytes: what the unconditional branch of guidance
    reads.

    Args:
        batch: As from `build_batch`.
        probability: Of each item.
        generator: On the CPU; one number is drawn for each item, whatever the probability.
    """
    keep = torch.rand(len(batch.text), generator=generator, dtype=torch.float32, device="cpu") >= probability
    return replace(batch, text=batch.text * keep.to(batch.text.device)[:, None])


@isolated()
def disturb_codes(batch: Batch, probability: float, config: DiaConfig, generator: torch.Generator) -> Batch:
    """Put a random code in the place of some of those that the decoder reads, each with `probability`.

    The labels stay, so that the model learns to go on after a code that it would better not have sampled. BOS, EOS and
    PAD stay, too.

    Args:
        batch: As from `build_batch`.
        probability: Of each code.
        config: Of the model.
        generator: On the CPU; nothing is drawn if probability is 0.
    """
    if not probability:
        return batch
    given, codes = batch.delayed_codes, config.decoder.eos_token_id
    others = torch.randint(codes, given.shape, generator=generator, dtype=torch.int64, device="cpu").to(given.device)
    hit = (torch.rand(given.shape, generator=generator, dtype=torch.float32, device="cpu") < probability).to(
        given.device
    ) & (given < codes)
    return replace(batch, delayed_codes=torch.where(hit, others, given))
