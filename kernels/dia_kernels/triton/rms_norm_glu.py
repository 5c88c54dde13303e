"""rms_norm_glu: `out = silu(gate) * up` where `gate, up = (rms_norm(x) @ weight.T).chunk(2, -1)`.

Fuses RMSNorm, both projections and the activation: a program multiplies by the same rows of both halves of the weights,
so gate and up of a feature meet in registers, in fp32, and are rounded once. See `gemv.project`.
"""

import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch
from dia_kernels.reference.linear import Weight
from dia_kernels.triton import gemv
from dia_kernels.triton import gemv_layout as layout


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_glu(
    x_ptr,  # [rows, K]
    norm_ptr,  # [K]
    weight_ptr,  # [2 * N, K], gate rows first
    scale_ptr,  # [2 * N] float32 for weights in 8 bits, else None
    out_ptr,  # [rows, N]
    rows,
    EPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,  # Tile: BLOCK_N rows of the weights, half of them gate, half up
):
    HALF: tl.constexpr = T.BLOCK_N // 2
    tile, skip = layout.program_tile(T)
    if T.ROW_BLOCKS > 1:
        x_ptr, out_ptr, rows = x_ptr + skip * K, out_ptr + skip * N, rows - skip
    first = tile * HALF
    local = layout.tile_rows(T.BLOCK_N, T)
    weight_rows = tl.minimum(first + local % HALF, N - 1) + local // HALF * N
    w_tiles = gemv.prefetch(weight_ptr, weight_rows, K, T)
    both = tl.arange(0, T.BLOCK_N)
    features = tl.minimum(first + both % HALF, N - 1) + both // HALF * N
    total = gemv.project(w_tiles, x_ptr, norm_ptr, weight_ptr, weight_rows, scale_ptr, features, rows, EPS, K, True, T)
    gate, up = tl.split(tl.permute(tl.reshape(total, (T.BLOCK_R, 2, HALF)), (0, 2, 1)))
    value = gate / (1.0 + tl.exp(-gate)) * up
    r, n = tl.arange(0, T.BLOCK_R)[:, None], first + tl.arange(0, HALF)[None, :]
    tl.store(out_ptr + r * N + n, value.to(out_ptr.dtype.element_ty), mask=(r < rows) & (n < N))


def rms_norm_glu(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """As `dia_kernels.reference.rms_norm_glu`. What the arguments must be: `gemv.check`."""
    (rows, hidden), features = x.shape, weight.shape[0]
    if features % 2:
        raise ValueError(f"weight: {features} rows, must be as many gate as up rows")
    gemv.check(
        rows,
        {
            "x": (x, (rows, hidden)),
            "norm_weight": (norm_weight, (hidden,)),
            "weight": (weight, (features, hidden)),
            "out": (out, (rows, features // 2)),
        },
    )
    values, scales = gemv.parts(weight)
    tile, options = gemv.configuration("rms_norm_glu", x, values)
    grid = (triton.cdiv(features, tile.BLOCK_N) * tile.ROW_BLOCKS,)
    launch.run(
        _rms_norm_glu,
        grid,
        x,
        norm_weight,
        values,
        scales,
        out,
        rows,
        EPS=eps,
        N=features // 2,
        K=hidden,
        T=tile,
        **options,
    )
    return out
