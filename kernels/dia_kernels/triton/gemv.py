"""The inner loop of every decode projection: `x @ weight.T` for 1 to 64 rows, the weights streamed from memory once.

One program computes `BLOCK_N` output features for all rows; its `SPLIT_K` warps share the reduction axis. A step
covers `SPLIT_K * CHUNKS * K_LANES * VECTOR` columns of the weights, an equal share of them per warp.

*Loads.* A tile has six axes: chunks, groups of rows, warps, two of lanes, and the vector of one 128-bit load, in the
very lanes in which the matrix instruction wants its operand: which columns meet in one instruction does not matter as
long as both operands agree, so `_operand` only renames axes and nothing moves between lanes or through shared memory.
`DEPTH` steps of weights are in flight in registers. A barrier after their loads (`FENCE`) keeps the compiler from
moving them down to their use, which it otherwise does to save registers.

*One result for any number of rows.* Rows are padded to `BLOCK_R` by repeating the last one; what is more than `BLOCK_R`
goes to other programs (`ROW_BLOCKS`), which find the weights in the cache. The instruction, the order
of its accumulation and the tree that adds up the warps depend on the other constants only, never on `BLOCK_R`,
`BLOCK_N`, `DEPTH` or `X_AHEAD`: a row comes out the same to the bit whatever the others are. Hence matrix instructions
from one row on.

*Norm.* The operand is `x * norm`, rounded once, and the row's `1 / rms(x)` multiplies the sum: one pass over x, and the
rounding is as large, relative to the operand, as that of the reference. Not so in fp16, where `x * norm` may overflow
or lose bits below 2^-14: there the operand is `x / rms(x) * norm`, as in the reference, for a second pass over x. So it
is on AMD, too, whose compiler otherwise holds all of x in registers, and spills at 64 rows.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch

MAX_ROWS = 64

# Triton gives lanes, then warps, then registers to the axes of a tile: from the last one, up to 3.6 from the first.
_FROM_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def place(ROW_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile of weights of this program, and its first row: programs of the same weights follow one another."""
    if ROW_BLOCKS > 1:
        return tl.program_id(0) // ROW_BLOCKS, tl.program_id(0) % ROW_BLOCKS * BLOCK_R
    return tl.program_id(0), 0


@triton.jit
def _axis(SIZE: tl.constexpr, RANK: tl.constexpr):
    """`arange(SIZE)` along the axis of a tile that is `RANK`-th to get lanes (the last axis, the vector, aside)."""
    position: tl.constexpr = RANK if _FROM_FIRST else 4 - RANK
    index = tl.arange(0, SIZE)
    for _ in tl.static_range(position):
        index = tl.expand_dims(index, 0)
    for _ in tl.static_range(5 - position):
        index = tl.expand_dims(index, -1)
    return index


@triton.jit
def _columns(
    CHUNKS: tl.constexpr, SPLIT_K: tl.constexpr, K_LANES: tl.constexpr, VECTOR: tl.constexpr, K_INNER: tl.constexpr
):
    """Column of every element of a tile within its step."""
    lane = (_axis(SPLIT_K, 2) * CHUNKS + _axis(CHUNKS, 4)) * K_LANES + _axis(K_LANES, 0 if K_INNER else 1)
    return lane * VECTOR + tl.arange(0, VECTOR)[None, None, None, None, None, :]


@triton.jit
def tile_rows(ROWS: tl.constexpr, ROW_LANES: tl.constexpr, K_INNER: tl.constexpr):
    """Row of every element of a tile of `ROWS` rows."""
    return _axis(ROWS // ROW_LANES, 3) * ROW_LANES + _axis(ROW_LANES, 1 if K_INNER else 0)


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
    inner: tl.constexpr = K_LANES if K_INNER else ROW_LANES
    outer: tl.constexpr = ROW_LANES if K_INNER else K_LANES
    pieces: tl.constexpr = VECTOR // INSTR_VECTOR
    if _FROM_FIRST:
        tile = tl.reshape(tile, (inner, outer, SPLIT_K, groups, CHUNKS, pieces, INSTR_VECTOR))
        tile = tl.permute(tile, (2, 3, 1, 4, 5, 0, 6) if K_INNER else (2, 3, 0, 4, 5, 1, 6))
    else:
        tile = tl.reshape(tile, (CHUNKS, groups, SPLIT_K, outer, inner, pieces, INSTR_VECTOR))
        tile = tl.permute(tile, (2, 1, 3, 0, 5, 4, 6) if K_INNER else (2, 1, 4, 0, 5, 3, 6))
    return tl.reshape(tile, (SPLIT_K, ROWS, CHUNKS * K_LANES * VECTOR))


@triton.jit
def _sum_columns(tile, K_INNER: tl.constexpr):
    """Sum over the columns of a tile whose vectors are summed up already."""
    rank: tl.constexpr = 0 if K_INNER else 1
    tile = tl.sum(tile, 4 if _FROM_FIRST else 0, keep_dims=True)
    tile = tl.sum(tile, rank if _FROM_FIRST else 4 - rank, keep_dims=True)
    return tl.sum(tile, 2, keep_dims=True)


@triton.jit
def _row_vector(tile, ROWS: tl.constexpr, K_INNER: tl.constexpr):
    """`[ROWS]` of a tile that has one column."""
    if _FROM_FIRST:
        tile = tl.permute(tile, (0, 2, 4, 5, 3, 1))
    return tl.reshape(tile, (ROWS,))


@triton.jit
def _round(value, DTYPE: tl.constexpr, AMD: tl.constexpr):
    """float32 to `DTYPE`, to nearest even.

    By hand for bf16 on AMD, most of whose GPUs have no instruction for it: half of what the compiler makes of it, by
    leaving out its care for NaN, whose lower half is 0 here: it stems from a bf16 or from 0 * inf.
    """
    if AMD and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def _load(pointers, columns, K: tl.constexpr, EVEN_K: tl.constexpr, POLICY: tl.constexpr, CACHE: tl.constexpr):
    if EVEN_K:
        return tl.load(pointers, eviction_policy=POLICY, cache_modifier=CACHE)
    else:
        return tl.load(pointers, mask=columns < K, other=0, eviction_policy=POLICY, cache_modifier=CACHE)


@triton.jit
def _zero_behind_loads(x_ptr, USE_PDL: tl.constexpr):
    """0.0, which is known only once every load so far has been requested: what begins with it comes behind them all.

    The compiler would move each load down to its use, or the products up between the loads, and wait for one after
    another. No load can pass the fence, and no sum can begin before the zero that is loaded behind it.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    else:
        tl.debug_barrier()
    anything = tl.load(x_ptr).to(tl.float32).to(tl.int32, bitcast=True)
    return (anything & (tl.num_programs(2) - 1)).to(tl.float32, bitcast=True)


@triton.jit
def begin(
    weight_ptr,  # [features, K]
    weight_rows,  # rows of the weights this program multiplies by, as `tile_rows(BLOCK_N, ...)` lays them out
    K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPTH: tl.constexpr,
    K_LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    K_INNER: tl.constexpr,
    FENCE: tl.constexpr,
    AMD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Requests the weights of the first `DEPTH` steps, then waits for the launch before this one: `project` goes on."""
    STEP: tl.constexpr = SPLIT_K * CHUNKS * K_LANES * VECTOR
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = K % STEP == 0
    STREAM: tl.constexpr = ".cg" if AMD else ""
    columns = _columns(CHUNKS, SPLIT_K, K_LANES, VECTOR, K_INNER)
    weights = weight_ptr + (weight_rows.to(tl.int64) * K + columns)
    flying = (_load(weights, columns, K, EVEN_K, "evict_first", STREAM),)
    for step in tl.static_range(1, DEPTH):
        if step < STEPS:
            first = step * STEP
            flying = flying + (_load(weights + first, columns + first, K, EVEN_K, "evict_first", STREAM),)  # type: ignore
    if FENCE:
        tl.debug_barrier()
    if USE_PDL:
        # Weights never change, so they may be read while the previous kernel still runs; nothing else may.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    return flying


@triton.jit
def project(
    flying,  # of `begin`
    x_ptr,  # [rows, K]
    norm_ptr,  # [K], unless not HAS_NORM
    weight_ptr,  # [features, K]
    weight_rows,  # as for `begin`
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
    X_AHEAD: tl.constexpr,
    AMD: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """`(rms_norm(x) if HAS_NORM else x) @ weight[weight_rows].T`, `[BLOCK_R, BLOCK_N]` float32; the last row pads."""
    STEP: tl.constexpr = SPLIT_K * CHUNKS * K_LANES * VECTOR
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = K % STEP == 0
    SCALE_FIRST: tl.constexpr = AMD or x_ptr.dtype.element_ty == tl.float16
    # AMD's compiler drops eviction policies; there, this modifier is what marks a load as streaming.
    STREAM: tl.constexpr = ".cg" if AMD else ""
    columns = _columns(CHUNKS, SPLIT_K, K_LANES, VECTOR, K_INNER)
    weights = weight_ptr + (weight_rows.to(tl.int64) * K + columns)
    x_rows = tl.minimum(tile_rows(BLOCK_R, ROW_LANES, K_INNER), rows - 1)
    inputs = x_ptr + (x_rows * K + columns)

    if HAS_NORM:
        # Every row lane reads the weights of the norm: the same lanes as x, so that nothing has to move.
        norms = norm_ptr + (tile_rows(ROW_LANES, ROW_LANES, K_INNER) * 0 + columns)
        squares = tl.zeros(inputs.shape, tl.float32)
        squares = tl.sum(squares, 5, keep_dims=True)
        if SCALE_FIRST:
            for step in tl.static_range(STEPS):
                first = step * STEP
                x = _load(inputs + first, columns + first, K, EVEN_K, "evict_last", "").to(tl.float32)
                squares += tl.sum(x * x, 5, keep_dims=True)
            scale = tl.rsqrt(_sum_columns(squares, K_INNER) / K + EPS)
            # x is read again below rather than kept: it is in the nearest cache, and registers are what limits DEPTH.
            tl.debug_barrier()

    coming = (_load(inputs, columns, K, EVEN_K, "evict_last", ""),)
    if HAS_NORM and X_AHEAD > 1:
        scales = (_load(norms, columns, K, EVEN_K, "evict_last", ""),)
    for step in tl.static_range(1, X_AHEAD):
        if step < STEPS:
            first = step * STEP
            coming = coming + (_load(inputs + first, columns + first, K, EVEN_K, "evict_last", ""),)  # type: ignore
            if HAS_NORM:
                scales = scales + (_load(norms + first, columns + first, K, EVEN_K, "evict_last", ""),)  # type: ignore
    zero = 0.0
    if X_AHEAD > 1:
        zero = _zero_behind_loads(x_ptr, USE_PDL)
    acc = tl.full((SPLIT_K, BLOCK_R, BLOCK_N), zero, tl.float32)
    for step in tl.static_range(STEPS):
        x = coming[0]
        coming = coming[1:]  # type: ignore[assignment]
        if X_AHEAD == 1 and step + 1 < STEPS:
            behind = (step + 1) * STEP
            coming = (_load(inputs + behind, columns + behind, K, EVEN_K, "evict_last", ""),)
        if HAS_NORM:
            if X_AHEAD > 1:
                norm = scales[0].to(tl.float32)
                scales = scales[1:]  # type: ignore[assignment]
            else:
                norm = _load(norms + step * STEP, columns + step * STEP, K, EVEN_K, "evict_last", "").to(tl.float32)
            wide = x.to(tl.float32)
            if SCALE_FIRST:
                x = _round(wide * scale * norm, x.dtype, AMD)
            else:
                squares += tl.sum(wide * wide, 5, keep_dims=True)
                x = _round(wide * norm, x.dtype, AMD)
        x = _operand(x, BLOCK_R, CHUNKS, SPLIT_K, ROW_LANES, K_LANES, VECTOR, INSTR_VECTOR, K_INNER)
        w = _operand(flying[0], BLOCK_N, CHUNKS, SPLIT_K, ROW_LANES, K_LANES, VECTOR, INSTR_VECTOR, K_INNER)
        acc = tl.dot(x, tl.permute(w, (0, 2, 1)), acc, input_precision="ieee")
        flying = flying[1:]
        if X_AHEAD > 1 and step + X_AHEAD < STEPS:
            behind = (step + X_AHEAD) * STEP
            coming = coming + (_load(inputs + behind, columns + behind, K, EVEN_K, "evict_last", ""),)  # type: ignore
            if HAS_NORM:
                scales = scales + (_load(norms + behind, columns + behind, K, EVEN_K, "evict_last", ""),)  # type: ignore
        if step + DEPTH < STEPS:
            behind = (step + DEPTH) * STEP
            flying = flying + (_load(weights + behind, columns + behind, K, EVEN_K, "evict_first", STREAM),)
        if FENCE and (step + DEPTH < STEPS or (X_AHEAD > 1 and step + X_AHEAD < STEPS)):
            tl.debug_barrier()
        if X_AHEAD == 0 and step + 1 < STEPS:
            behind = (step + 1) * STEP
            coming = (_load(inputs + behind, columns + behind, K, EVEN_K, "evict_last", ""),)
    total = tl.sum(acc, 0)
    if HAS_NORM and not SCALE_FIRST:
        scale = tl.rsqrt(_sum_columns(squares, K_INNER) / K + EPS)
        total *= _row_vector(scale, BLOCK_R, K_INNER)[:, None]
    return total


def rule(dtype: torch.dtype, arch: str, *, rows: int, features: int, hidden: int, normed: int) -> dict[str, int]:
    """Default configuration. `BLOCK_R`, `BLOCK_N`, `DEPTH`, `X_AHEAD` alone may follow `rows`: the rest fixes a row's
    bits.

    Chosen from the machine code: no spills, and two programs an SM up to 16 rows, so that the next kernel's weights
    are already on their way while this one ends. What is called measured was, on an H200, for one guided request.
    """
    config = {"SPLIT_K": 8, "CHUNKS": 2, "VECTOR": 16 // dtype.itemsize, "num_warps": 8, "num_stages": 1}
    if arch.startswith("gfx"):
        wave = 64 if arch.startswith("gfx9") else 32
        instr_vector = {"gfx942": 4, "gfx90a": 4, "gfx908": 4}.get(arch, 8) if dtype.itemsize == 2 else 1
        config |= {"ROW_LANES": 16, "K_LANES": wave // 16, "INSTR_VECTOR": instr_vector, "K_INNER": 0}
        # The fence of RDNA's compiler waits for the loads themselves, which is the opposite of what it is for.
        config |= {"FENCE": int(wave == 64), "X_AHEAD": 0, "AMD": 1, "USE_PDL": 0, "matrix_instr_nonkdim": 16}
        block_r = max(16, triton.next_power_of_2(rows))
    else:
        config |= {"ROW_LANES": 8, "K_LANES": 4, "INSTR_VECTOR": 2, "K_INNER": 1, "FENCE": 1, "AMD": 0}
        config |= {"USE_PDL": int(arch.startswith("sm_") and int(arch[3:]) >= 90)}
        block_r = max(8, triton.next_power_of_2(rows))
        # x of the next step is on its way while this one is multiplied, where there are registers for it.
        config |= {"X_AHEAD": int(block_r == 8)}
    if config["USE_PDL"]:
        config |= {"launch_pdl": 1}
    block_n, depth = 16, 4
    measured = arch == "sm_90" and dtype == torch.bfloat16
    if measured:
        config["X_AHEAD"] *= 2  # all that registers hold: see `project`
    if measured and normed and features >= 8 * hidden > 0:
        # Where there are programs in plenty, small ones leave no gaps.
        config |= {"SPLIT_K": 4, "num_warps": 4, "CHUNKS": 4}
        depth = 1 if block_r == 8 else 2
    elif measured and features == hidden == 2048:
        # The cross-attention's and both O projections: few weights, which are all on their way before the wait, and
        # then nothing but latency, which small programs cut. Measured was cross_q; o and cross_o take the same.
        config |= {"SPLIT_K": 4, "num_warps": 4, "X_AHEAD": 2 * config["X_AHEAD"]}
        block_n, depth = (16, 128 // block_r) if normed and block_r >= 32 else (8, 8)
    elif measured and not normed and hidden >= 8192 and block_r == 8:
        block_n, depth = 8, 8  # long rows, and two programs an SM in place of one
    elif dtype == torch.float32 and config["AMD"]:
        depth = 1 if block_r >= 32 else 2
        if normed and config["K_LANES"] == 2:
            block_r = min(block_r, 32)  # without matrix instructions for it, 64 rows would spill
    elif dtype == torch.float32:  # a thread multiplies by all columns of a step at once: half as many spill nothing
        config["CHUNKS"] = 1
        if normed and arch.startswith("sm_12"):
            block_r = min(block_r, 32)  # its compiler finds too few registers for 64
        # Compilers for sm_100 and up hold more of what is in flight in registers.
        half = (8, 2) if arch.startswith("sm_1") else (16, 2)
        block_n, depth = {32: half, 64: (8, 1 if arch.startswith("sm_12") else 2)}.get(block_r, (16, 8))
    elif normed and config["AMD"]:
        if config["K_LANES"] == 2:
            block_r = min(block_r, 32)  # some of its compilers find too few registers for 64
        block_n = 16 if config["K_LANES"] == 2 else 64 if block_r == 32 else 32
        depth = 4 if block_r == 16 and config["K_LANES"] == 4 else 2
    elif normed and (block_r == 32 or (block_r == 64 and dtype == torch.float16)):
        # Every program forms x * norm, in fp16 with the scale, for all rows: the fewer programs the fewer instructions.
        block_n, depth = 32, 64 // block_r
    elif normed and block_r == 64:
        block_n, depth = (8, 4) if arch.startswith("sm_12") else (16, 2)  # its compiler finds fewer registers
    return config | {"BLOCK_R": block_r, "BLOCK_N": block_n, "DEPTH": depth}


def configuration(op: str, x: Tensor, features: int, normed: bool) -> dict[str, int]:
    """Configuration of one launch of `op`: see `launch.configuration` and `rule`."""
    rows, hidden = x.shape
    config = launch.configuration(
        op, rule, x.dtype, x.device, rows=rows, features=features, hidden=hidden, normed=int(normed)
    )
    return config | {"ROW_BLOCKS": triton.cdiv(rows, config["BLOCK_R"])}


def check(rows: int, named: Mapping[str, tuple[Tensor, tuple[int, ...]]], out_dtype: torch.dtype | None = None) -> None:
    """Raises ValueError or TypeError naming the argument that the kernels cannot take.

    named: each tensor with the shape it must have, x first. Rows 1 to 64, hidden size (the last axis of x) a multiple
    of 16, everything contiguous, 16-byte aligned, on one device and of one dtype (float32, float16 or bfloat16), but
    for `out` if it must be of out_dtype.
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
        expected = out_dtype if name == "out" and out_dtype else x.dtype
        if tensor.dtype != expected:
            raise TypeError(f"{name}: dtype {tensor.dtype}, needs {expected} beside x of {x.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: has strides {tensor.stride()}, must be contiguous")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}")
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            raise ValueError(
                f"{name}: starts at an address that is not a multiple of 16 bytes; copy it to a new tensor"
            )
