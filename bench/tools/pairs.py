"""The same weights in transformers and in dia_fast, and the inputs that transformers' processor would make."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DiaForConditionalGeneration

from bench.tools.tiny_models import random_state
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, fused_slices
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops

Texts = Sequence[Sequence[int]]
Prompts = Sequence[Tensor]  # `[frames, channels]` each, no rows for none


def pack(config: DiaConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of transformers, copied to where `fused_slices` says."""
    dtype = next(iter(state.values())).dtype
    fused = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in fused_shapes(config).items()}
    for name, (target, first, last) in fused_slices(config).items():
        fused[target][first:last] = state[name]
    return fused


def pair(
    config: DiaConfig, seed: int = 0, dtype: torch.dtype = torch.float32, eos_gain: float = 1.0
) -> tuple[DiaForConditionalGeneration, DiaModel]:
    """Return (transformers' model, ours). eos_gain: factor on the logit of EOS, which then wins more often."""
    state = random_state(config, seed, dtype)
    state["logits_dense.weight"][config.decoder.eos_token_id] *= eos_gain
    model = DiaModel(config, get_ops("torch")).load(pack(config, state))
    return theirs_sharing(model), model


def theirs_sharing(model: DiaModel) -> DiaForConditionalGeneration:
    """Return transformers' model on views of our fused weights: no memory, no copy."""
    from transformers import DiaConfig as TransformersConfig
    from transformers.models.dia.modeling_dia import DiaRotaryEmbedding

    config, fused = model.config, model.state_dict()
    settings = TransformersConfig(**config.to_transformers())
    with torch.device("meta"):
        theirs = DiaForConditionalGeneration(settings)
    views = {name: fused[target][first:last] for name, (target, first, last) in fused_slices(config).items()}
    theirs.load_state_dict(views, assign=True)
    # What is computed rather than loaded is still without memory.
    for name in ("encoder", "decoder"):
        rotation = DiaRotaryEmbedding(getattr(settings, f"{name}_config"))
        getattr(theirs.model, name).rotary_emb = rotation.to(model.device)
    codes = torch.arange(config.decoder.num_channels, device=model.device)
    theirs.model.decoder.embeddings.offsets = codes * config.decoder.vocab_size
    return theirs.eval()


def random_texts(config: DiaConfig, lengths: Sequence[int]) -> list[list[int]]:
    """Return texts of these lengths, as ids."""
    return [torch.randint(1, config.encoder.vocab_size, (length,)).tolist() for length in lengths]


def random_prompts(config: DiaConfig, lengths: Sequence[int]) -> list[Tensor]:
    """Return audio prompts of these lengths, as codes `[frames, channels]`."""
    decoder = config.decoder
    return [torch.randint(0, decoder.eos_token_id, (length, decoder.num_channels)) for length in lengths]


def random_grid(config: DiaConfig, batch: int, steps: int) -> Tensor:
    """`[batch, steps, channels]` of any codes, special ones too."""
    return torch.randint(0, config.decoder.vocab_size, (batch, steps, config.decoder.num_channels))


def text_inputs(texts: Texts) -> dict[str, Tensor]:
    """Texts padded to the longest with 0, and the mask that tells."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def delayed_inputs(config: DiaConfig, prompts: Prompts) -> dict[str, Tensor]:
    """Return `DiaProcessor`'s form of audio prompts: delayed, BOS before, PAD where free; shorter ones start later."""
    decoder, delay = config.decoder, config.delay_pattern
    longest = max(prompt.shape[0] for prompt in prompts)
    shape = (len(prompts), longest + 1 + max(delay), len(delay))
    grid = torch.full(shape, decoder.pad_token_id)
    mask = torch.ones(shape[:2], dtype=torch.long)
    for item, prompt in enumerate(prompts):
        late = longest - prompt.shape[0]
        mask[item, :late] = 0
        for channel, channel_delay in enumerate(delay):
            begin = late + 1 + channel_delay
            grid[item, :begin, channel] = decoder.bos_token_id
            grid[item, begin : begin + prompt.shape[0], channel] = prompt[:, channel]
    return {"decoder_input_ids": grid, "decoder_attention_mask": mask}


def their_logits(theirs: DiaForConditionalGeneration, texts: Texts, rows: Tensor, conditional: bool = True) -> Tensor:
    """Teacher-forced logits of transformers, `[batch, steps, channels, vocab]`; unconditional: text of zeros."""
    inputs = text_inputs(texts)
    if not conditional:
        inputs["input_ids"].zero_()
    with torch.inference_mode():
        logits = theirs(**inputs, decoder_input_ids=rows).logits
    return logits.view(rows.shape[0], rows.shape[2], rows.shape[1], -1).transpose(1, 2)


def their_rows(
    theirs: DiaForConditionalGeneration,
    config: DiaConfig,
    texts: Texts,
    prompts: Prompts | None = None,
    **settings: Any,
) -> list[Tensor]:
    """`generate` of transformers: per request, the grid from its row 0 on, padding of the batch included at its end."""
    decoder = config.decoder
    prompts = prompts or random_prompts(config, [0] * len(texts))
    settings = {"do_sample": False, "top_k": None, "guidance_scale": None} | settings
    tokens = {name: getattr(decoder, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    inputs = text_inputs(texts) | delayed_inputs(config, prompts)
    there = {name: tensor.to(theirs.device) for name, tensor in inputs.items()}
    grid = theirs.generate(**there, **tokens, **settings)
    longest = max(prompt.shape[0] for prompt in prompts)
    return [rows[longest - prompt.shape[0] :] for rows, prompt in zip(grid, prompts, strict=True)]
