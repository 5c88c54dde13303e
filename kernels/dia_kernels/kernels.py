"""The op set in Triton. An op that has no kernel is absent: nothing here ever falls back to torch."""

from torch import Tensor

from dia_kernels.codebook_logits import codebook_logits
from dia_kernels.cross_attention import cross_attention
from dia_kernels.embed_codes import embed_codes
from dia_kernels.glu import glu
from dia_kernels.linear_residual import linear_residual
from dia_kernels.paged import attention_workspace
from dia_kernels.ragged_attention import ragged_attention
from dia_kernels.rms_norm import rms_norm
from dia_kernels.rms_norm_glu import rms_norm_glu
from dia_kernels.rms_norm_linear import rms_norm_linear
from dia_kernels.rope import rope
from dia_kernels.rope_attention import rope_attention
from dia_kernels.sample import sample
from dia_kernels.snake import snake, snake_residual

name = "triton"


def pack(weight: Tensor) -> Tensor:
    """The weight as it is: kernels stream it in that layout."""
    return weight


__all__ = [
    "attention_workspace",
    "codebook_logits",
    "cross_attention",
    "embed_codes",
    "glu",
    "linear_residual",
    "pack",
    "ragged_attention",
    "rms_norm",
    "rms_norm_glu",
    "rms_norm_linear",
    "rope",
    "rope_attention",
    "sample",
    "snake",
    "snake_residual",
]
