"""rms_norm_linear: `out = rms_norm(x) @ weight.T`: the QKV projection and the cross-attention query projection.

Fuses the norm into the projection (`gemv.project`): every program normalises all rows for itself, while its first
weights are on their way. Moves `features * hidden` weights, and x once per program from the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch
from dia_kernels.triton import gemv


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_linear(
    x_ptr,  # [rows, K]
    norm_ptr,  # [K]
    weight_ptr,  # [N, K]
    out_ptr,  # [rows, N]
    rows,
    EPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_LANES: tl.constexpr,
    K_LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    INSTR_VECTOR: tl.constexpr,
    K_INNER: tl.constexpr,
    FENCE: tl.constexpr,
    X_AHEAD: tl.constexpr,
    AMD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    tile, skip = gemv.place(ROW_BLOCKS, BLOCK_R)
    if ROW_BLOCKS > 1:
        x_ptr, out_ptr, rows = x_ptr + skip * K, out_ptr + skip * N, rows - skip
    first = tile * BLOCK_N
    weight_rows = tl.minimum(first + gemv.tile_rows(BLOCK_N, ROW_LANES, K_INNER), N - 1)
    flying = gemv.begin(
        weight_ptr, weight_rows, K, SPLIT_K, CHUNKS, DEPTH, K_LANES, VECTOR, K_INNER, FENCE, AMD, USE_PDL
    )
    total = gemv.project(
        flying, x_ptr, norm_ptr, weight_ptr, weight_rows, rows, EPS, K, True, BLOCK_N, BLOCK_R, SPLIT_K, CHUNKS, DEPTH,
        ROW_LANES, K_LANES, VECTOR, INSTR_VECTOR, K_INNER, FENCE, X_AHEAD, AMD, USE_PDL,
    )  # fmt: skip
    r, n = tl.arange(0, BLOCK_R)[:, None], first + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + r * N + n, total.to(out_ptr.dtype.element_ty), mask=(r < rows) & (n < N))


def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
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
    config = gemv.configuration("rms_norm_linear", x, features, normed=True)
    grid = (triton.cdiv(features, config["BLOCK_N"]) * config["ROW_BLOCKS"],)
    launch.run(_rms_norm_linear, grid, x, norm_weight, weight, out, rows, EPS=eps, N=features, K=hidden, **config)
    return out
