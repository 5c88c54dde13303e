"""The op set in plain torch: the specification every kernel is judged against, and what runs on a CPU.

Nothing here imports Triton. Every op writes into buffers that the caller owns and returns the one it wrote.
"""

from dia_kernels.reference.attention import attention_workspace, cross_attention, ragged_attention, rope, rope_attention
from dia_kernels.reference.codec import snake, snake_residual
from dia_kernels.reference.embedding import embed_codes
from dia_kernels.reference.linear import (
    codebook_logits,
    glu,
    linear_residual,
    rms_norm,
    rms_norm_glu,
    rms_norm_linear,
)
from dia_kernels.reference.sampling import philox, sample, sample_weights
from dia_kernels.reference.weight import PackedWeight

name = "torch"

__all__ = [
    "PackedWeight",
    "attention_workspace",
    "codebook_logits",
    "cross_attention",
    "embed_codes",
    "glu",
    "linear_residual",
    "philox",
    "ragged_attention",
    "rms_norm",
    "rms_norm_glu",
    "rms_norm_linear",
    "rope",
    "rope_attention",
    "sample",
    "sample_weights",
    "snake",
    "snake_residual",
]
