"""The inner loop of every decode projection: `x @ weight.T` for 1 to 64 rows, the weights streamed exactly once.

One program computes `BLOCK_N` output features for all rows; its `SPLIT_K` warps share the reduction axis. A step
covers `SPLIT_K * CHUNKS * K_LANES * VECTOR` columns of the weights, an equal share of them per warp.

*Loads.* A tile is loaded as `[CHUNKS, rows / ROW_LANES, SPLIT_K, lanes..., VECTOR]`, one 128-bit load per lane, in the
very lanes in which the matrix instruction wants its operand: which columns meet in one instruction does not matter as
long as both operands agree, so `_operand` only renames axes and nothing moves between lanes or through shared memory.
`DEPTH` steps of weights are in flight in registers. A barrier after their loads (`FENCE`) keeps the compiler from
moving them down to their use, which it otherwise does to save registers.

*One result for any number of rows.* Rows are padded to `BLOCK_R` by repeating the last one. The instruction, the order
of its accumulation and the tree that adds up the warps depend on the other constants only, never on `BLOCK_R`,
`BLOCK_N` or `DEPTH`: a row comes out the same to the bit whatever the others are. Hence matrix instructions from one
row on.

*Normalised operand.* With `HAS_NORM` the operand is `x / rms(x) * norm`, computed in fp32 and rounded once, exactly as
the reference does. (Scaling after the product would save a pass over x, but overflows in fp16 once |x * norm| is
65520.)
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launch

MAX_ROWS = 64


@triton.jit
def _columns(
    CHUNKS: tl.constexpr, SPLIT_K: tl.constexpr, K_LANES: tl.constexpr, VECTOR: tl.constexpr, K_INNER: tl.constexpr
):
    """Column of every element of a tile within its step, `[CHUNKS, 1, SPLIT_K, lanes, VECTOR]`."""
    chunk = tl.arange(0, CHUNKS)[:, None, None, None, None, None]
    warp = tl.arange(0, SPLIT_K)[None, None, :, None, None, None]
    if K_INNER:
        lane = tl.arange(0, K_LANES)[None, None, None, None, :, None]
    else:
        lane = tl.arange(0, K_LANES)[None, None, None, :, None, None]
    element = tl.arange(0, VECTOR)[None, None, None, None, None, :]
    return ((warp * CHUNKS + chunk) * K_LANES + lane) * VECTOR + element


@triton.jit
def tile_rows(ROWS: tl.constexpr, ROW_LANES: tl.constexpr, K_INNER: tl.constexpr):
    """Row of every element of a tile of `ROWS` rows, `[1, ROWS / ROW_LANES, 1, lanes, 1]`."""
    group = tl.arange(0, ROWS // ROW_LANES)[None, :, None, None, None, None]
    if K_INNER:
        lane = tl.arange(0, ROW_LANES)[None, None, None, :, None, None]
    else:
        lane = tl.arange(0, ROW_LANES)[None, None, None, None, :, None]
    return group * ROW_LANES + lane


@triton.jit
def _operand(
    tile,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROW_LANES: tl.constexpr,
    K_LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    INSTR_VECTOR: tl.constexpr,
    K_INNER: tl.constexpr,
):
    """`[SPLIT_K, ROWS, columns]` of a loaded tile, the columns in the order in which the lanes feed the instruction.

    An instruction takes `INSTR_VECTOR` neighbouring columns from each lane, the lanes' pieces one after another.
    """
    groups: tl.constexpr = ROWS // ROW_LANES
    pieces: tl.constexpr = VECTOR // INSTR_VECTOR
    if K_INNER:
        tile = tl.reshape(tile, (CHUNKS, groups, SPLIT_K, ROW_LANES, K_LANES, pieces, INSTR_VECTOR))
        tile = tl.permute(tile, (2, 1, 3, 0, 5, 4, 6))
    else:
        tile = tl.reshape(tile, (CHUNKS, groups, SPLIT_K, K_LANES, ROW_LANES, pieces, INSTR_VECTOR))
        tile = tl.permute(tile, (2, 1, 4, 0, 5, 3, 6))
    return tl.reshape(tile, (SPLIT_K, ROWS, CHUNKS * K_LANES * VECTOR))


@triton.jit
def _load(pointers, columns, first, K: tl.constexpr, EVEN_K: tl.constexpr, POLICY: tl.constexpr):
    if EVEN_K:
        return tl.load(pointers + first, eviction_policy=POLICY)
    return tl.load(pointers + first, mask=columns + first < K, other=0.0, eviction_policy=POLICY)


@triton.jit
def project(
    x_ptr,  # [rows, K]
    norm_ptr,  # [K], unless not HAS_NORM
    weight_ptr,  # [features, K]
    weight_rows,  # rows of the weights this program multiplies by, as `tile_rows(BLOCK_N, ...)` lays them out
    rows,
    EPS: tl.constexpr,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_LANES: tl.constexpr,
    K_LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    INSTR_VECTOR: tl.constexpr,
    K_INNER: tl.constexpr,
    FENCE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """`(rms_norm(x) if HAS_NORM else x) @ weight[weight_rows].T`, `[BLOCK_R, BLOCK_N]` float32; the last row pads."""
    STEP: tl.constexpr = SPLIT_K * CHUNKS * K_LANES * VECTOR
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = K % STEP == 0
    columns = _columns(CHUNKS, SPLIT_K, K_LANES, VECTOR, K_INNER)
    weights = weight_ptr + (weight_rows.to(tl.int64) * K + columns)
    x_rows = tl.minimum(tile_rows(BLOCK_R, ROW_LANES, K_INNER), rows - 1)
    inputs = x_ptr + (x_rows * K + columns)

    flying = (_load(weights, columns, 0, K, EVEN_K, "evict_first"),)
    for step in tl.static_range(1, DEPTH):
        if step < STEPS:
            flying = flying + (_load(weights, columns, step * STEP, K, EVEN_K, "evict_first"),)  # type: ignore[assignment]
    if FENCE:
        tl.debug_barrier()
    if USE_PDL:
        # Weights never change, so they may be read while the previous kernel still runs; nothing else may.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    if HAS_NORM:
        # Every row lane reads the weights of the norm: the same lanes as x, so that nothing has to move.
        norms = norm_ptr + (tile_rows(ROW_LANES, ROW_LANES, K_INNER) * 0 + columns)
        x = _load(inputs, columns, 0, K, EVEN_K, "evict_last").to(tl.float32)
        squares = tl.sum(x * x, 5, keep_dims=True)
        for step in tl.static_range(1, STEPS):
            x = _load(inputs, columns, step * STEP, K, EVEN_K, "evict_last").to(tl.float32)
            squares += tl.sum(x * x, 5, keep_dims=True)
        squares = tl.sum(tl.sum(squares, 0, keep_dims=True), 4 if K_INNER else 3, keep_dims=True)
        scale = tl.rsqrt(tl.sum(squares, 2, keep_dims=True) / K + EPS)
        # x is read again below rather than kept: it is in the nearest cache, and registers are what limits DEPTH.
        tl.debug_barrier()

    acc = tl.zeros((SPLIT_K, BLOCK_R, BLOCK_N), tl.float32)
    for step in tl.static_range(STEPS):
        x = _load(inputs, columns, step * STEP, K, EVEN_K, "evict_last")
        if HAS_NORM:
            norm = _load(norms, columns, step * STEP, K, EVEN_K, "evict_last").to(tl.float32)
            x = (x.to(tl.float32) * scale * norm).to(x.dtype)
        x = _operand(x, BLOCK_R, CHUNKS, SPLIT_K, ROW_LANES, K_LANES, VECTOR, INSTR_VECTOR, K_INNER)
        w = _operand(flying[0], BLOCK_N, CHUNKS, SPLIT_K, ROW_LANES, K_LANES, VECTOR, INSTR_VECTOR, K_INNER)
        acc = tl.dot(x, tl.permute(w, (0, 2, 1)), acc, input_precision="ieee")
        if step + DEPTH < STEPS:
            flying = flying[1:] + (_load(weights, columns, (step + DEPTH) * STEP, K, EVEN_K, "evict_first"),)
            if FENCE:
                tl.debug_barrier()
        else:
            flying = flying[1:]  # type: ignore[assignment]
    return tl.sum(acc, 0)


def rule(dtype: torch.dtype, arch: str, *, rows: int, features: int, hidden: int, normed: int) -> dict[str, int]:
    """Default configuration. `BLOCK_R`, `BLOCK_N` and `DEPTH` alone may follow `rows`: the rest fixes a row's bits."""
    vector = 16 // dtype.itemsize
    config = {"SPLIT_K": 8, "CHUNKS": 2, "VECTOR": vector, "num_warps": 8, "num_stages": 1}
    block_r = max(16, triton.next_power_of_2(rows))
    if arch.startswith("gfx"):
        wave = 64 if arch.startswith("gfx9") else 32
        instr_vector = {"gfx942": 4, "gfx90a": 4, "gfx908": 4}.get(arch, 8) if dtype.itemsize == 2 else 1
        config |= {"ROW_LANES": 16, "K_LANES": wave // 16, "INSTR_VECTOR": instr_vector, "K_INNER": 0}
        # The fence of RDNA's compiler waits for the loads themselves, which is the opposite of what it is for.
        config |= {"FENCE": int(wave == 64), "USE_PDL": 0, "matrix_instr_nonkdim": 16}
    else:
        config |= {"ROW_LANES": 8, "K_LANES": 4, "INSTR_VECTOR": 2, "K_INNER": 1, "FENCE": 1}
        config |= {"USE_PDL": int(arch.startswith("sm_") and int(arch[3:]) >= 90)}
        block_r = max(8, triton.next_power_of_2(rows))
    if config["USE_PDL"]:
        config |= {"launch_pdl": 1}
    wide = dtype.itemsize == 2 and block_r >= 32
    config |= {
        "BLOCK_R": block_r,
        "BLOCK_N": 32 if wide else 16,
        "DEPTH": 2 if block_r == 64 or dtype.itemsize == 4 else 4,
    }
    return config


def configuration(op: str, x: Tensor, features: int, normed: bool) -> dict[str, int]:
    """Configuration of one launch of `op`: see `launch.configuration` and `rule`."""
    rows, hidden = x.shape
    return launch.configuration(
        op, rule, x.dtype, x.device, rows=rows, features=features, hidden=hidden, normed=int(normed)
    )


def check(rows: int, named: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raises ValueError or TypeError naming the argument that the kernels cannot take.

    named: each tensor with the shape it must have, x first. Rows 1 to 64, hidden size (the last axis of x) a multiple
    of 16, everything contiguous, 16-byte aligned, on one device and of one dtype (float32, float16 or bfloat16).
    """
    x = next(iter(named.values()))[0]
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x: dtype {x.dtype} is not supported, use float32, float16 or bfloat16")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"x: {rows} rows, one launch takes 1 to {MAX_ROWS}")
    if x.shape[-1] % 16:
        raise ValueError(f"x: width {x.shape[-1]} is not a multiple of 16")
    for name, (tensor, shape) in named.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != x.dtype and not (name == "out" and tensor.dtype == torch.float32):
            raise TypeError(f"{name}: dtype {tensor.dtype}, x has {x.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: has strides {tensor.stride()}, must be contiguous")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}")
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            raise ValueError(
                f"{name}: starts at an address that is not a multiple of 16 bytes; copy it to a new tensor"
            )
