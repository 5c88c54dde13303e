"""Single ops of `dia_kernels` in the modules of a transformers model, one flag each."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import DiaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dia.modeling_dia import DiaMLP, DiaRMSNorm, DiaSelfAttention, eager_attention_forward

from dia_fast.integrations.transformers import attention
from dia_fast.integrations.transformers.binding import WeakMethod
from dia_kernels.autograd import differentiable

BACKEND = "_dia_fast_backend"


def patch(model: DiaForConditionalGeneration, backend: str, *, rms_norm: bool, glu: bool, rope_attention: bool) -> None:
    """Give the modules that the flags name a forward method on our ops. All of them are differentiable."""
    wanted: dict[type, Callable[..., Any]] = {}
    if rms_norm:
        wanted[DiaRMSNorm] = _rms_norm
    if glu:
        wanted[DiaMLP] = _glu
    if rope_attention:
        wanted[DiaSelfAttention] = _rope_attention
    module: Any
    for module in model.modules():
        if type(module) in wanted:
            module.forward = WeakMethod(wanted[type(module)], module)
            setattr(module, BACKEND, backend)


def unpatch(model: DiaForConditionalGeneration) -> None:
    """Give every module its own forward method back."""
    for module in model.modules():
        if module.__dict__.pop(BACKEND, None) is not None:
            module.__dict__.pop("forward", None)


@functools.lru_cache
def gradient_ops(backend: str, device: torch.device) -> ModuleType:
    """`differentiable.gradient_ops`, remembered: it is asked for at each call of each module."""
    return differentiable.gradient_ops(backend, device)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Normalise in float32 and round once, after the weight; transformers rounds before it, too."""
    ops = gradient_ops(self.__dict__[BACKEND], hidden_states.device)
    return differentiable.rms_norm(hidden_states, self.weight, self.variance_epsilon, ops)


def _glu(self: Any, hidden_states: Tensor) -> Tensor:
    ops = gradient_ops(self.__dict__[BACKEND], hidden_states.device)
    return self.down_proj(differentiable.glu(self.gate_up_proj(hidden_states), ops))


def _rope_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """RoPE of q and k in one pass, in float32, then attention.

    Whole unpadded sequences go through the op `ragged_attention`; with a cache, a mask or gradients the implementation
    that the model is set to computes them.
    """
    assert position_embeddings is not None
    batch, tokens, _ = hidden_states.shape
    qkv = torch.cat([project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
    half = self.head_dim // 2
    cos, sin = (
        part.expand(batch, -1, -1).reshape(batch * tokens, -1)[:, :half].float().contiguous()
        for part in position_embeddings
    )
    positions = torch.arange(batch * tokens, dtype=torch.int32, device=qkv.device)
    ops = gradient_ops(self.__dict__[BACKEND], qkv.device)
    heads, kv_heads = self.num_heads, self.num_key_value_heads
    turned = differentiable.rope(qkv.view(batch * tokens, -1), cos, sin, positions, kv_heads, ops)
    split = turned.view(batch, tokens, -1, self.head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    query, key, value = split
    if past_key_values is not None:
        extra = () if cache_position is None else ({"cache_position": cache_position},)
        key, value = past_key_values.update(key, value, self.layer_idx, *extra)
    chosen = self.config._attn_implementation
    if chosen == "sdpa":
        chosen = attention.NAME
    interface = eager_attention_forward if chosen == "eager" else ALL_ATTENTION_FUNCTIONS[chosen]
    attended, weights = interface(
        self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
    )  # fmt: skip
    attended = attended.reshape(batch, tokens, -1).contiguous()
    return self.o_proj(attended), weights


FORWARDS = (_rms_norm, _glu, _rope_attention)
for _method in FORWARDS:
    _method.__name__ = "forward"  # by which a bound method is pickled
