"""rms_norm_linear: `out = rms_norm(x) @ weight.T`: the QKV projection and the cross-attention query projection.

Fuses the norm into the projection (`gemv.project`): every program normalises all rows for itself, while its first
weights are on their way. Moves `features * hidden` weights, and x once per program from the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch
from dia_kernels.reference.linear import Weight
from dia_kernels.triton import gemv
from dia_kernels.triton import gemv_layout as layout


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_linear(
    x_ptr,  # [rows, K]
    norm_ptr,  # [K]
    weight_ptr,  # [N, K]
    scale_ptr,  # [N] float32 for weights in 8 bits, else None
    out_ptr,  # [rows, N]
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
    tl.store(out_ptr + r * N + n, total.to(out_ptr.dtype.element_ty), mask=(r < rows) & (n < N))


def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """As `dia_kernels.reference.rms_norm_linear`. What the arguments must be: `gemv.check`."""
    (rows, hidden), features = x.shape, weight.shape[0]
    gemv.check(
        rows,
        {
            "x": (x, (rows, hidden)),
            "norm_weight": (norm_weight, (hidden,)),
            "weight": (weight, (features, hidden)),
            "out": (out, (rows, features)),
        },
    )
    values, scales = gemv.parts(weight)
    tile, options = gemv.configuration("rms_norm_linear", x, values)
    grid = (triton.cdiv(features, tile.BLOCK_N) * tile.ROW_BLOCKS,)
    launch.run(
        _rms_norm_linear,
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
