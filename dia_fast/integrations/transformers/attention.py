"""`attn_implementation="dia_fast"`: the attention kernel behind transformers' attention interface."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dia_kernels import torch_library as library

NAME = "dia_fast"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of whole sequences by the op `ragged_attention`.

    Args:
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, head_dim]`.

    Returns:
        `[batch, tokens, heads, head_dim]` and no weights. What the op does not do is torch's: steps with a cache, masks
        (padding), gradients.
    """
    if not serves(query, key, value, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, tokens, head_dim = query.shape
    scaling = kwargs.get("scaling")
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    q, k, v = (part.transpose(1, 2).reshape(batch * tokens, -1, head_dim) for part in (query, key, value))
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * tokens
    return library.ragged_attention(q, k, v, starts, causal, scale).view(batch, tokens, heads, head_dim), None


def serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Tell whether `attention` of these is the kernel's, and not torch's."""
    graded = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return mask is None and query.shape[2] == key.shape[2] and not graded


def register() -> None:
    """Make `attn_implementation="dia_fast"` known to transformers. Masks are made as for `"sdpa"`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
