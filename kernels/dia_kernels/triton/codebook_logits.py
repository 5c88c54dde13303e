"""codebook_logits: `out = (rms_norm(x) @ weight.T)` as float32: the final norm and the heads of all channels at once.

The product is rounded to the dtype of x before it is stored as float32 (docs/dia.md: the head's result is rounded, all
that follows is float32). Otherwise `rms_norm_linear`: see there and `gemv.project`.
"""

import triton
import triton.language as tl
from torch import Tensor, float32

from dia_kernels import launcher as launch
from dia_kernels.reference.linear import Weight
from dia_kernels.triton import gemv
from dia_kernels.triton import gemv_layout as layout


@triton.jit(do_not_specialize=["rows"])
def _codebook_logits(
    x_ptr,  # [rows, K]
    norm_ptr,  # [K]
    weight_ptr,  # [N, K]
    scale_ptr,  # [N] float32 for weights in 8 bits, else None
    out_ptr,  # [rows, N] float32
    rows,
    EPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,  # Tile
):
    tile, skip = layout.program_tile(T)
    if T.ROW_BLOCKS > 1:
        x_ptr, out_ptr, rows = x_ptr + skip * K, out_ptr + skip * N, rows - skip
    first = tile * T.BLOCK_N
    weight_rows = tl.minimum(first + layout.tile_rows(T.BLOCK_N, T), N - 1)
    w_tiles = gemv.prefetch(weight_ptr, weight_rows, K, T)
    features = tl.minimum(first + tl.arange(0, T.BLOCK_N), N - 1)
    total = gemv.project(w_tiles, x_ptr, norm_ptr, weight_ptr, weight_rows, scale_ptr, features, rows, EPS, K, True, T)
    r, n = tl.arange(0, T.BLOCK_R)[:, None], first + tl.arange(0, T.BLOCK_N)[None, :]
    rounded = total.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + r * N + n, rounded, mask=(r < rows) & (n < N))


def codebook_logits(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """As `dia_kernels.reference.codebook_logits`. What the arguments must be: `gemv.check`; out is float32."""
    (rows, hidden), features = x.shape, weight.shape[0]
    channels = out.shape[1]
    if features % channels:
        raise ValueError(f"weight: {features} rows are no multiple of the {channels} channels of out")
    gemv.check(
        rows,
        {
            "x": (x, (rows, hidden)),
            "norm_weight": (norm_weight, (hidden,)),
            "weight": (weight, (features, hidden)),
            "out": (out, (rows, channels, features // channels)),
        },
        out_dtype=float32,
    )
    values, scales = gemv.parts(weight)
    tile, options = gemv.configuration("codebook_logits", x, values)
    grid = (triton.cdiv(features, tile.BLOCK_N) * tile.ROW_BLOCKS,)
    launch.run(
        _codebook_logits,
        grid,
        x,
        norm_weight,
        values,
        scales,
        out,
        rows,
        EPS=eps,
        N=features,
        K=hidden,
        T=tile,
        **options,
    )
    return out
