"""Batches, loss and gradients against transformers."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.tools.pairs import pack, random_prompts, random_texts
from bench.tools.tiny_models import random_state, tiny_config, transformers_model
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_slices
from dia_fast.model.model import DiaModel
from dia_fast.text.tokenizer import encode_text
from dia_fast.training import Batch, Example, batch_loss, build_batch
from dia_kernels import get_ops
from tests.helpers.strategies import configs
from tests.helpers.tolerance import EVALUATIONS, assert_equal_up_to_rounding, assert_same_numbers, nudged_weights


def examples(config: DiaConfig, texts: Sequence[int], frames: Sequence[int]) -> list[Example]:
    """Random examples with texts of so many bytes and speech of so many frames."""
    pairs = zip(random_texts(config, texts), random_prompts(config, frames), strict=True)
    return [Example(text, codes) for text, codes in pairs]


def as_transformers(batch: Batch) -> dict[str, Tensor]:
    """The arguments of transformers' forward."""
    return {
        "input_ids": batch.text,
        "attention_mask": batch.text_mask.long(),
        "decoder_input_ids": batch.delayed_codes,
        "decoder_attention_mask": batch.step_mask.long(),
        "labels": batch.labels.transpose(1, 2).flatten(0, 1).contiguous(),
    }


def ours_and_theirs(config: DiaConfig, seed: int = 0) -> tuple[DiaModel, Any]:
    """Two models with the same weights, both to be differentiated."""
    model = DiaModel(config, get_ops("torch")).load(pack(config, random_state(config, seed)))
    return model.requires_grad_(True), transformers_model(config, seed)


def assert_same_loss_and_gradients(config: DiaConfig, batch: Batch, seed: int = 0, **options: Any) -> None:
    model, theirs = ours_and_theirs(config, seed)
    loss = batch_loss(model, batch, **options).mean
    loss.backward()
    losses, gradients = [], []
    for moved in range(EVALUATIONS):
        with nudged_weights(theirs, moved) if moved else nullcontext():
            theirs.zero_grad()
            expected = theirs(**as_transformers(batch)).loss
            expected.backward()
            losses.append([expected.item()])
            gradients.append({name: weight.grad.clone() for name, weight in theirs.named_parameters()})
    # A mean of differences of a logit and a logarithm: rounded at that size, which evaluations that agree do not show.
    assert_same_numbers([loss.item()], losses, "loss", terms=abs(losses[0][0]))
    fused, wanted = dict(model.named_parameters()), dict(theirs.named_parameters())
    found = fused_slices(config)
    assert found.keys() == wanted.keys()
    # Of one token attention forgets its queries and keys: their gradient is a difference that cancels.
    terms = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, (target, first, last) in found.items():
        gradient = fused[target].grad
        assert gradient is not None, name
        assert_equal_up_to_rounding(gradient[first:last], [found[name] for found in gradients], name, terms)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(recompute: bool) -> None:
    config = tiny_config()
    batch = build_batch(examples(config, (20, 7, 33), (40, 25, 31)), config)
    assert_same_loss_and_gradients(config, batch, recompute=recompute)


def test_loss_and_gradients_without_padding() -> None:
    config = tiny_config()
    assert_same_loss_and_gradients(config, build_batch(examples(config, (9, 9), (30, 30)), config), seed=1)


@settings(max_examples=25)
@given(
    configs(), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=3), st.integers(0, 99)
)
def test_loss_and_gradients_of_any_model(config: DiaConfig, sizes: list[tuple[int, int]], seed: int) -> None:
    # EOS below BOS and PAD, and room for every example: what any model of speech has.
    tokens = {"eos_token_id": 2, "pad_token_id": 3, "bos_token_id": 4, "vocab_size": config.decoder.vocab_size + 4}
    # A norm over very few elements nearly forgets its input: what is left of its gradient is rounding noise.
    encoder = replace(config.encoder, max_position_embeddings=64, hidden_size=config.encoder.hidden_size + 7)
    decoder = replace(
        config.decoder,
        **tokens,
        max_position_embeddings=64,
        hidden_size=config.decoder.hidden_size + 7,
        cross_hidden_size=encoder.hidden_size,
    )
    config = DiaConfig(encoder, decoder, config.delay_pattern)
    torch.manual_seed(seed)
    batch = build_batch(examples(config, *zip(*sizes, strict=True)), config)
    assert_same_loss_and_gradients(config, batch, seed)


def test_a_batch_is_what_their_processor_makes() -> None:
    from transformers import DacConfig, DacModel, DiaFeatureExtractor, DiaProcessor, DiaTokenizer

    settings = DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 4], decoder_hidden_size=16, n_codebooks=9, codebook_dim=4,
        codebook_size=1024, sampling_rate=8000, hop_length=8,
    )  # fmt: skip
    codec = DacModel(settings).eval()
    extractor = DiaFeatureExtractor(sampling_rate=8000, hop_length=8)
    processor = DiaProcessor(extractor, DiaTokenizer(), codec)
    texts = ["[S1] One. [S2] Two.", "[S1] Three, and a longer text."]
    noise = np.random.default_rng(0)
    sounds = [noise.normal(size=size, scale=0.1).astype(np.float32) for size in (400, 250)]
    theirs = processor(text=texts, audio=sounds, generation=False, output_labels=True, sampling_rate=8000, padding=True)
    pairs = []
    for text, sound in zip(texts, sounds, strict=True):
        wave = torch.from_numpy(np.pad(sound, (0, -len(sound) % 8)))
        with torch.no_grad():
            codes = codec.encode(wave[None, None]).audio_codes[0].T
        pairs.append(Example(encode_text(text), codes))
    for name, tensor in as_transformers(build_batch(pairs, tiny_config())).items():
        assert torch.equal(tensor, theirs[name].long()), name
