"""linear_residual: `residual[:m] += x @ weight.T`, and `residual[m:] += constant`: the O and down projections.

The sum is formed in fp32 and rounded once. Rows without an input (`m` and up) get a vector instead: the unconditional
rows' cross-attention, which is the same for every token (docs/dia.md). See `gemv.project`.
"""

import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch
from dia_kernels.reference.linear import Weight
from dia_kernels.triton import gemv
from dia_kernels.triton import gemv_layout as layout


@triton.jit
def _add_constant(
    residual_ptr, constant_ptr, n, rows, all_rows,
    N: tl.constexpr, BLOCK_C: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add the constant to the rows without an input, from `rows` on, in columns n."""
    c = rows + tl.arange(0, BLOCK_C)[:, None]
    inside = (c < all_rows) & (n < N)
    if ROW_BLOCKS > 1:
        inside = inside & (rows <= BLOCK_R)  # the program of the last rows does it
    old = tl.load(residual_ptr + c * N + n, mask=inside, other=0.0)
    constant = tl.load(constant_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(residual_ptr + c * N + n, (old.to(tl.float32) + constant).to(old.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows", "all_rows"])
def _linear_residual(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]
    scale_ptr,  # [N] float32 for weights in 8 bits, else None
    residual_ptr,  # [all_rows, N], in place
    constant_ptr,  # [N], unless BLOCK_C is 0
    rows,
    all_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least all_rows - rows
    T: tl.constexpr,  # Tile
):
    tile, skip = layout.program_tile(T)
    if T.ROW_BLOCKS > 1:
        x_ptr, residual_ptr, rows, all_rows = x_ptr + skip * K, residual_ptr + skip * N, rows - skip, all_rows - skip
    first = tile * T.BLOCK_N
    weight_rows = tl.minimum(first + layout.tile_rows(T.BLOCK_N, T), N - 1)
    w_tiles = gemv.prefetch(weight_ptr, weight_rows, K, T)
    r, n = tl.arange(0, T.BLOCK_R)[:, None], first + tl.arange(0, T.BLOCK_N)[None, :]
    inside = (r < rows) & (n < N)
    # Early, where there are registers to keep it in: all that is left behind the product is to store.
    EARLY: tl.constexpr = not T.AMD and T.BLOCK_R <= 8
    if EARLY:
        old = tl.load(residual_ptr + r * N + n, mask=inside, other=0.0)
    if BLOCK_C > 0 and not T.AMD:
        _add_constant(residual_ptr, constant_ptr, n, rows, all_rows, N, BLOCK_C, T.ROW_BLOCKS, T.BLOCK_R)
    features = tl.minimum(first + tl.arange(0, T.BLOCK_N), N - 1)
    total = gemv.project(w_tiles, x_ptr, x_ptr, weight_ptr, weight_rows, scale_ptr, features, rows, 0.0, K, False, T)
    if not EARLY:
        old = tl.load(residual_ptr + r * N + n, mask=inside, other=0.0)
    tl.store(residual_ptr + r * N + n, (old.to(tl.float32) + total).to(old.dtype), mask=inside)
    if BLOCK_C > 0 and T.AMD:
        _add_constant(residual_ptr, constant_ptr, n, rows, all_rows, N, BLOCK_C, T.ROW_BLOCKS, T.BLOCK_R)


def linear_residual(x: Tensor, weight: Weight, residual: Tensor, constant: Tensor | None = None) -> Tensor:
    """As `dia_kernels.reference.linear_residual`. What the arguments must be: `gemv.check`."""
    (rows, width), features, all_rows = x.shape, weight.shape[0], residual.shape[0]
    named: dict[str, tuple[Weight, tuple[int, ...]]] = {
        "x": (x, (rows, width)),
        "weight": (weight, (features, width)),
        "residual": (residual, (all_rows, features)),
    }
    if all_rows < rows:
        raise ValueError(f"residual: {all_rows} rows, x has {rows}")
    if all_rows > rows and constant is None:
        raise ValueError(f"constant: needed, residual has {all_rows} rows and x only {rows}")
    if constant is not None and all_rows > rows:
        named["constant"] = (constant, (features,))
    gemv.check(rows, named)
    values, scales = gemv.parts(weight)
    tile, options = gemv.configuration("linear_residual", x, values)
    block_c = triton.next_power_of_2(all_rows - rows) if all_rows > rows else 0
    grid = (triton.cdiv(features, tile.BLOCK_N) * tile.ROW_BLOCKS,)
    vector = constant if all_rows > rows else None
    launch.run(
        _linear_residual,
        grid,
        x,
        values,
        scales,
        residual,
        vector,
        rows,
        all_rows,
        N=features,
        K=width,
        BLOCK_C=block_c,
        T=tile,
        **options,
    )
    return residual
