"""rms_norm_glu: `out = silu(gate) * up` where `gate, up = (rms_norm(x) @ weight.T).chunk(2, -1)`.

Fuses RMSNorm, both projections and the activation: a program multiplies by the same rows of both halves of the weights,
so gate and up of a feature meet in registers, in fp32, and are rounded once. See `gemv.project`.
"""

import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch
from dia_kernels.triton import gemv


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_glu(
    x_ptr,  # [rows, K]
    norm_ptr,  # [K]
    weight_ptr,  # [2 * N, K], gate rows first
    out_ptr,  # [rows, N]
    rows,
    EPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of the weights: half of them gate, half up
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
    HALF: tl.constexpr = BLOCK_N // 2
    tile, skip = gemv.place(ROW_BLOCKS, BLOCK_R)
    if ROW_BLOCKS > 1:
        x_ptr, out_ptr, rows = x_ptr + skip * K, out_ptr + skip * N, rows - skip
    first = tile * HALF
    local = gemv.tile_rows(BLOCK_N, ROW_LANES, K_INNER)
    weight_rows = tl.minimum(first + local % HALF, N - 1) + local // HALF * N
    flying = gemv.begin(
        weight_ptr, weight_rows, K, SPLIT_K, CHUNKS, DEPTH, K_LANES, VECTOR, K_INNER, FENCE, AMD, USE_PDL
    )
    total = gemv.project(
        flying, x_ptr, norm_ptr, weight_ptr, weight_rows, rows, EPS, K, True, BLOCK_N, BLOCK_R, SPLIT_K, CHUNKS, DEPTH,
        ROW_LANES, K_LANES, VECTOR, INSTR_VECTOR, K_INNER, FENCE, X_AHEAD, AMD, USE_PDL,
    )  # fmt: skip
    gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_R, 2, HALF)), (0, 2, 1)))
    value = gate / (1.0 + tl.exp(-gate)) * up
    r, n = tl.arange(0, BLOCK_R)[:, None], first + tl.arange(0, HALF)[None, :]
    tl.store(out_ptr + r * N + n, value.to(out_ptr.dtype.element_ty), mask=(r < rows) & (n < N))


def rms_norm_glu(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
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
    config = gemv.configuration("rms_norm_glu", x, features, normed=True)
    grid = (triton.cdiv(features, config["BLOCK_N"]) * config["ROW_BLOCKS"],)
    launch.run(_rms_norm_glu, grid, x, norm_weight, weight, out, rows, EPS=eps, N=features // 2, K=hidden, **config)
    return out
