"""The model as a differentiable function of its weights: what `DiaModel` computes, a whole batch at a time.

Attention and matrix products are torch's; RMSNorm, RoPE, GLU and the heads with their loss are those of
`dia_kernels.autograd.differentiable`. Weights may be wider than the arithmetic: they are rounded where they are used,
and their gradients arrive in their own dtype.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.model import DiaModel, rope_table
from dia_fast.training.batch import Batch
from dia_fast.utils.ambient import isolated
from dia_kernels.autograd.differentiable import glu, gradient_ops, linear_cross_entropy, rms_norm, rope


class Adapter(Protocol):
    """Something added to the product of an input and a packed weight: `added(x)` is `[..., out]` for x `[..., in]`."""

    def added(self, x: Tensor) -> Tensor:
        """Compute what is added, `[..., out]`, for x `[..., in]`."""
        ...


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of a batch.

    Args:
        total: What to differentiate, the weighted sum over all labels, a float32 scalar.
        weight: The sum of the weights of those labels, so that `total / weight` is the mean.
        sums: The unweighted losses and the number of labels of each channel, `[channels]`.
        counts: As `sums`.
    """

    total: Tensor
    weight: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> Tensor:
        """The weighted mean over the labels: what transformers calls the loss, when all weights are 1."""
        return self.total / self.weight


@isolated(grad=True)
def batch_loss(
    model: DiaModel,
    batch: Batch,
    *,
    dtype: torch.dtype | None = None,
    channel_weights: Tensor | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    recompute: bool = False,
) -> Loss:
    """The cross-entropy of a batch on the model's device; call `.mean.backward()` on it.

    Args:
        model: With its weights loaded.
        batch: On the model's device.
        dtype: Of activations and matrix products (default: that of the weights).
        channel_weights: `[channels]` float32 on the device (default: ones).
        adapters: See `Forward`.
        recompute: See `Forward`.
    """
    run = Forward(model, dtype or model.dtype, adapters or {}, recompute)
    x = run.hidden_states(batch)
    labels = batch.labels.flatten(0, 1)
    if channel_weights is None:
        channel_weights = torch.ones(labels.shape[1], device=labels.device, dtype=torch.float32)
    counts = batch.counts()
    total, sums = linear_cross_entropy(x.flatten(0, 1), model.decoder.head, labels, channel_weights, run.ops)
    return Loss(total, (counts * channel_weights).sum(), sums, counts)


class Forward:
    """One pass through a model.

    Args:
        dtype: Of activations and matrix products.
        adapters: By packed name, such as `decoder.layers.0.qkv`.
        recompute: Keep only the input of each layer and compute the rest again in the backward pass: much less memory,
            a third more time.
    """

    def __init__(
        self,
        model: DiaModel,
        dtype: torch.dtype,
        adapters: Mapping[str, Adapter],
        recompute: bool = False,
    ) -> None:
        self.model, self.dtype, self.adapters, self.recompute = model, dtype, adapters, recompute
        self.weights = dict(model.named_parameters())
        self.first_generation = model.config.first_generation
        self.ops = gradient_ops(model.ops.name, model.device)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Compute the input of the heads: `[batch, steps, hidden]` in `dtype`."""
        memory = self._encode(batch.text, batch.text_mask)
        return self._decode(batch.delayed_codes, batch.step_mask, memory, batch.text_mask)

    def _encode(self, text: Tensor, mask: Tensor) -> Tensor:
        config = self.model.config.encoder
        x = F.embedding(text, self.weights["encoder.embedding"]).to(self.dtype)
        rotation = _Rotation(self.model.config, "encoder", x)
        seen = None if bool(mask.all()) else mask[:, None, None, :]
        for layer in range(config.num_hidden_layers):
            prefix = f"encoder.layers.{layer}."

            def run(x: Tensor, prefix: str = prefix) -> Tensor:
                x = x + self._self_attention(x, prefix, config, rotation, seen, causal=False)
                return x + self._mlp(x, prefix, config.norm_eps)

            x = self._layer(run, x)
        return self._norm(x, "encoder.norm", config.norm_eps)

    def _decode(self, delayed_codes: Tensor, mask: Tensor, memory: Tensor, text_mask: Tensor) -> Tensor:
        config = self.model.config.decoder
        index = (
            delayed_codes
            + torch.arange(config.num_channels, device=delayed_codes.device, dtype=torch.int64) * config.vocab_size
        )
        # Summed in the weights' own dtype and without nine times the memory.
        x = F.embedding_bag(index.flatten(0, 1), self.weights["decoder.embedding"], mode="sum")
        x = x.view(*delayed_codes.shape[:2], -1).to(self.dtype)
        rotation = _Rotation(self.model.config, "decoder", x)
        turns: list[_Rotation] = []
        if self.first_generation:  # where positions of two kinds meet, padding must not shift them
            sides = ((x, mask), (memory, text_mask))
            turns = [_Rotation(self.model.config, "cross", side, seen_of) for side, seen_of in sides]
        seen, causal = _causal_mask(mask)
        text_seen = None if bool(text_mask.all()) else text_mask[:, None, None, :]
        for layer in range(config.num_hidden_layers):
            prefix = f"decoder.layers.{layer}."

            def run(x: Tensor, memory: Tensor, prefix: str = prefix) -> Tensor:
                x = x + self._self_attention(x, prefix, config, rotation, seen, causal)
                x = x + self._cross_attention(x, prefix, config, memory, text_seen, turns)
                return x + self._mlp(x, prefix, config.norm_eps)

            x = self._layer(run, x, memory)
        return self._norm(x, "decoder.norm", config.norm_eps)

    def _layer(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(run, *inputs, use_reentrant=False)
            return result
        return run(*inputs)

    def _self_attention(
        self,
        x: Tensor,
        prefix: str,
        config: EncoderConfig | DecoderConfig,
        rotation: "_Rotation",
        seen: Tensor | None,
        causal: bool,
    ) -> Tensor:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self._linear(self._norm(x, f"{prefix}self_norm", config.norm_eps), f"{prefix}qkv")
        qkv = rope(qkv.flatten(0, 1), rotation.cos, rotation.sin, rotation.positions, kv_heads, self.ops)
        q, k, v = qkv.view(*x.shape[:2], -1, config.head_dim).split((heads, kv_heads, kv_heads), 2)
        return self._linear(_attention(q, k, v, seen, causal), f"{prefix}o")

    def _cross_attention(
        self,
        x: Tensor,
        prefix: str,
        config: DecoderConfig,
        memory: Tensor,
        seen: Tensor | None,
        turns: "Sequence[_Rotation]",
    ) -> Tensor:
        """turns: how q and k are rotated, none for not at all."""
        q = self._linear(self._norm(x, f"{prefix}cross_norm", config.norm_eps), f"{prefix}cross_q")
        both = self._linear(memory, f"{prefix}cross_kv")
        if turns:
            (of_q, of_k), kv_heads = turns, config.cross_num_key_value_heads
            q = rope(q.flatten(0, 1), of_q.cos, of_q.sin, of_q.positions, 0, self.ops)
            both = rope(both.flatten(0, 1), of_k.cos, of_k.sin, of_k.positions, kv_heads, self.ops)
        q = q.view(*x.shape[:2], -1, config.cross_head_dim)
        both = both.view(*memory.shape[:2], -1, config.cross_head_dim)
        k, v = both.chunk(2, 2)
        return self._linear(_attention(q, k, v, seen, causal=False), f"{prefix}cross_o")

    def _mlp(self, x: Tensor, prefix: str, eps: float) -> Tensor:
        both = self._linear(self._norm(x, f"{prefix}mlp_norm", eps), f"{prefix}gate_up")
        return self._linear(glu(both, self.ops), f"{prefix}down")

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return rms_norm(x, self.weights[name], eps, self.ops)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = F.linear(x, self.weights[name].to(x.dtype))
        adapter = self.adapters.get(name)
        return out if adapter is None else out + adapter.added(x)


class _Rotation:
    """The tables of RoPE and the position of every token of `x`, `[batch, tokens, hidden]`.

    Padding on the left shifts positions; within a sequence only their differences matter.

    Args:
        mask: `[batch, tokens]` bool; with it only real tokens are counted.
    """

    def __init__(self, config: DiaConfig, part: str, x: Tensor, mask: Tensor | None = None) -> None:
        self.cos, self.sin = _rope_table(config, part, x.device)
        if mask is None:
            self.positions = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).repeat(x.shape[0])
        else:
            self.positions = (mask.cumsum(1) - 1).clamp(min=0).flatten().to(torch.int32)


@functools.lru_cache(maxsize=8)
def _rope_table(config: DiaConfig, part: str, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # else a first use in inference mode would make tables that cannot be saved
        return rope_table(config, part, device)


def _causal_mask(mask: Tensor) -> tuple[Tensor | None, bool]:
    """The mask of the decoder's self-attention, and whether it is plainly causal and none is needed.

    mask: `[batch, steps]` bool. A padded row sees itself, so that its softmax has something to sum; nobody sees it.
    """
    if bool(mask.all()):
        return None, True
    steps = mask.shape[1]
    causal = torch.ones(steps, steps, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(steps, dtype=torch.bool, device=mask.device)
    return ((causal & mask[:, None, :]) | itself)[:, None], False


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
    """Attention at scale 1: q `[batch, n, heads, head_dim]`, k and v with fewer heads: `[batch, n, heads * head_dim]`.

    seen: bool, broadcast to `[batch, heads, n, keys]`; what is True is attended to.
    """
    shared = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=seen, is_causal=causal, scale=1.0, enable_gqa=shared,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)
