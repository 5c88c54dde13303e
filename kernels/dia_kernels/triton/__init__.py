"""The op set in Triton. An op that has no kernel is absent: nothing here ever falls back to torch."""

from dia_kernels.triton.codebook_logits import codebook_logits
from dia_kernels.triton.cross_attention import cross_attention
from dia_kernels.triton.embed_codes import embed_codes
from dia_kernels.triton.glu import glu
from dia_kernels.triton.linear_residual import linear_residual
from dia_kernels.triton.paged_attention import attention_workspace
from dia_kernels.triton.ragged_attention import ragged_attention
from dia_kernels.triton.rms_norm import rms_norm
from dia_kernels.triton.rms_norm_glu import rms_norm_glu
from dia_kernels.triton.rms_norm_linear import rms_norm_linear
from dia_kernels.triton.rope import rope
from dia_kernels.triton.rope_attention import rope_attention
from dia_kernels.triton.sample import sample
from dia_kernels.triton.snake import snake, snake_residual

name = "triton"


__all__ = [
    "attention_workspace",
    "codebook_logits",
    "cross_attention",
    "embed_codes",
    "glu",
    "linear_residual",
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
