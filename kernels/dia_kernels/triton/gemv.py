"""The loop of every decode projection: `x @ weight.T` for 1 to 64 rows, the weights streamed from memory once.

One program computes `BLOCK_N` output features for all rows; its `SPLIT_K` warps share the reduction axis. A step
covers `SPLIT_K * CHUNKS * K_LANES * VECTOR` columns of the weights, an equal share of them per warp. `gemv_layout`
draws the tile that is loaded in a step, and defines the constants `Tile`, which kernels take as `T`.

    w_tiles = prefetch(...)      weights of the first DEPTH steps requested; then the launch before this one has ended
    project(w_tiles, ...)        per step: take a tile of x and one of w, multiply, request the tiles further ahead

*Loads.* `DEPTH` steps of weights are in flight in registers, in the very lanes in which the matrix instruction wants
its operand. A barrier after their loads (`FENCE`) keeps the compiler from moving them down to their use, which it
otherwise does to save registers.

*One result for any number of rows.* Rows are padded to `BLOCK_R` by repeating the last one; what is more than `BLOCK_R`
goes to other programs (`ROW_BLOCKS`), which find the weights in the cache. The instruction, the order
of its accumulation and the tree that adds up the warps depend on the other constants only, never on `BLOCK_R`,
`BLOCK_N`, `DEPTH` or `X_AHEAD`: a row comes out the same to the bit whatever the others are. Hence matrix instructions
from one row on.

*Norm.* The operand is `x * norm`, rounded once, and the row's `1 / rms(x)` multiplies the sum: one pass over x, and the
rounding is as large, relative to the operand, as that of the reference. Not so in fp16, where `x * norm` may overflow
or lose bits below 2^-14: there the operand is `x / rms(x) * norm`, as in the reference, for a second pass over x. So it
is on AMD, too, whose compiler otherwise holds all of x in registers, and spills at 64 rows.

*Through shared memory* (`STAGES`). With many rows every program reads all of x, which is more than its weights. Wider
programs read it less often, but have no registers for weights on their way. There a loop takes a chunk at a time, of x
and of the weights, which the compiler copies asynchronously `STAGES` chunks ahead. Products and sums are made in the
same order as in registers: the bits are the same.

*Weights in 8 bits* (`scale_ptr`). A load is 16 of them: on NVIDIA the columns that meet in an instruction are those
of four neighbouring bytes of each lane, so that they are widened where they lie. Widening is exact, and costs an
instruction a weight; the scale of a channel multiplies its sum, in float32. The weights are the first operand of the
instruction there: it takes 16 features at a time, and 8 rows, without copies of them.
"""

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher as launch
from dia_kernels.reference.linear import Weight
from dia_kernels.reference.quantized import Int8Weight
from dia_kernels.triton import gemv_layout as layout
from dia_kernels.triton.gemv_layout import Tile

MAX_ROWS = 64


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
def _widen(w, DTYPE: tl.constexpr, T: tl.constexpr):
    """Weights as the matrix instruction takes them: int8 becomes `DTYPE`, exactly; on NVIDIA bf16 is `1 / 64` of it.

    There a byte holds the value + 128 (the sign flipped), and is the low half of a 16-bit number. As bf16 that is
    subnormal, or the first normal numbers, which follow on in equal steps: byte * 2^-133. One multiply-add makes it
    byte * 2^-6 - 2, since 2^133 is beyond bf16. In fp16 a 0x64 above the byte makes 1024 + byte.
    """
    if w.dtype != tl.int8:
        return w
    elif T.PTX and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, f, o;
            xor.b32 u, $2, 0x80808080;
            mov.b32 f, 0x7F007F00;
            mov.b32 o, 0xC000C000;
            prmt.b32 $0, u, 0, 0x4140;
            prmt.b32 $1, u, 0, 0x4342;
            fma.rn.bf16x2 $0, $0, f, o;
            fma.rn.bf16x2 $1, $1, f, o;
            }""",
            "=r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    elif T.PTX and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, o;
            xor.b32 u, $2, 0x80808080;
            mov.b32 o, 0x64806480;
            prmt.b32 $0, u, 0x64646464, 0x4140;
            prmt.b32 $1, u, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, o;
            sub.f16x2 $1, $1, o;
            }""",
            "=r,=r,r",
            [w],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    elif T.AMD and tl.bfloat16 == DTYPE:
        # Bytes of 128 more than the value: one instruction makes a float32 of such a byte, wherever it lies in a word.
        wide = (w.to(tl.uint8, bitcast=True) ^ 128).to(tl.float32) - 128.0
        return (wide.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return w.to(DTYPE)


@triton.jit
def _scales(scale_ptr, features, x_ptr, T: tl.constexpr):
    """Scales of channels for products by what `_widen` returns."""
    UNIT: tl.constexpr = 64.0 if T.PTX and x_ptr.dtype.element_ty == tl.bfloat16 else 1.0
    return tl.load(scale_ptr + features) * UNIT


@triton.jit
def _multiply(x, w, acc, T: tl.constexpr):
    """Add the products of all warps: `[SPLIT_K, BLOCK_R, BLOCK_N]`, the last two swapped where `W_FIRST`."""
    if T.W_FIRST:
        return tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.permute(w, (0, 2, 1)), acc, input_precision="ieee")


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
def prefetch(
    weight_ptr,  # [features, K]
    weight_rows,  # rows of the weights this program multiplies by, as `tile_rows(BLOCK_N, T)` lays them out
    K: tl.constexpr,
    T: tl.constexpr,
):
    """Request the weights of the first `DEPTH` steps, then wait for the launch before this one: `project` goes on."""
    DEPTH: tl.constexpr = T.DEPTH
    STEP: tl.constexpr = T.SPLIT_K * T.CHUNKS * T.K_LANES * T.VECTOR
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = K % STEP == 0
    STREAM: tl.constexpr = ".cg" if T.AMD else ""
    columns = layout.tile_columns(T.VECTOR, T)
    weights = weight_ptr + (weight_rows.to(tl.int64) * K + columns)
    w_tiles = (weights,)
    if T.STAGES == 0:
        w_tiles = (_load(weights, columns, K, EVEN_K, "evict_first", STREAM),)
        for step in tl.static_range(1, DEPTH):
            if step < STEPS:
                first = step * STEP
                w_tiles = w_tiles + (_load(weights + first, columns + first, K, EVEN_K, "evict_first", STREAM),)  # type: ignore
    if T.FENCE and T.STAGES == 0:
        tl.debug_barrier()
    if T.USE_PDL:
        # Weights never change, so they may be read while the previous kernel still runs; nothing else may.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    return w_tiles


@triton.jit
def _norm_scale(squares, inputs, columns, EPS: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """1 / rms of each row, from a pass over x of its own; squares: 0, a column of each vector."""
    STEP: tl.constexpr = T.SPLIT_K * T.CHUNKS * T.K_LANES * T.VECTOR
    for step in tl.static_range((K + STEP - 1) // STEP):
        first = step * STEP
        x = _load(inputs + first, columns + first, K, K % STEP == 0, "evict_last", "").to(tl.float32)
        squares += tl.sum(x * x, 5, keep_dims=True)
    scale = tl.rsqrt(layout.sum_columns(squares, T) / K + EPS)
    # x is read again afterwards rather than kept: it is in the nearest cache, and registers are what limits DEPTH.
    tl.debug_barrier()
    return scale


@triton.jit
def _normed(x, norm, squares, scale, SCALE_FIRST: tl.constexpr, T: tl.constexpr):
    """A tile of x as the operand of the product, and the squares with its own."""
    wide = x.to(tl.float32)
    if SCALE_FIRST:
        x = _round(wide * scale * norm, x.dtype, T.AMD)
    else:
        squares += tl.sum(wide * wide, 5, keep_dims=True)
        x = _round(wide * norm, x.dtype, T.AMD)
    return x, squares


@triton.jit
def _sum_staged(
    inputs,  # a pointer to each row of x, as `tile_rows(BLOCK_R, T)` lays them out
    norm_ptr,
    weight_ptr,
    weight_rows,  # as for `project`
    squares,  # as `project` has them
    scale,
    K: tl.constexpr,
    NORM: tl.constexpr,  # 0: none; 1: x * norm, and the sum of squares; 2: x * scale * norm
    T: tl.constexpr,
):
    """Sums of products and of squares, chunk by chunk through shared memory, in the order of `project`."""
    tl.static_assert(T.X_VECTOR == T.VECTOR, "STAGES: x and weights must be of one width")
    CHUNK: tl.constexpr = T.K_LANES * T.VECTOR
    STEP: tl.constexpr = T.SPLIT_K * T.CHUNKS * CHUNK
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = K % STEP == 0
    columns = layout.chunk_columns(T)
    weights = weight_ptr + weight_rows.to(tl.int64) * K
    norm_rows = layout.tile_rows(T.ROW_LANES, T) * 0
    acc = tl.full((T.SPLIT_K, T.BLOCK_R, T.BLOCK_N), 0.0, tl.float32)
    for at in tl.range(0, STEPS * T.CHUNKS, num_stages=T.STAGES):
        here = at // T.CHUNKS * STEP + at % T.CHUNKS * CHUNK + columns
        w = _load(weights + here, here, K, EVEN_K, "evict_first", "")
        x = _load(inputs + here, here, K, EVEN_K, "evict_last", "")
        if NORM:
            norm = _load(norm_ptr + (norm_rows + here), here, K, EVEN_K, "evict_last", "").to(tl.float32)
            wide = x.to(tl.float32)
            if NORM == 1:
                squares += layout.in_chunk(tl.sum(wide * wide, 5, keep_dims=True), at % T.CHUNKS, T)
                x = _round(wide * norm, x.dtype, T.AMD)
            else:
                x = _round(wide * scale * norm, x.dtype, T.AMD)
        x = layout.operand(x, T.BLOCK_R, T.VECTOR, 1, T)
        w = layout.operand(w, T.BLOCK_N, T.VECTOR, 1, T)
        acc = _multiply(x, w, acc, T)
    return acc, squares


@triton.jit
def project(
    w_tiles,  # of `prefetch`
    x_ptr,  # [rows, K]
    norm_ptr,  # [K], unless not HAS_NORM
    weight_ptr,  # [features, K]
    weight_rows,  # as for `prefetch`
    scale_ptr,  # [features] float32, for weights in 8 bits; else None
    features,  # [BLOCK_N], as weight_rows: whose scales
    rows,
    EPS: tl.constexpr,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    T: tl.constexpr,
):
    """`(rms_norm(x) if HAS_NORM else x) @ weight[weight_rows].T`, `[BLOCK_R, BLOCK_N]` float32; the last row pads."""
    X_AHEAD: tl.constexpr = T.X_AHEAD
    STEP: tl.constexpr = T.SPLIT_K * T.CHUNKS * T.K_LANES * T.VECTOR
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = K % STEP == 0
    SCALE_FIRST: tl.constexpr = T.AMD or x_ptr.dtype.element_ty == tl.float16
    # AMD's compiler drops eviction policies; there, this modifier is what marks a load as streaming.
    STREAM: tl.constexpr = ".cg" if T.AMD else ""
    w_columns = layout.tile_columns(T.VECTOR, T)
    weights = weight_ptr + (weight_rows.to(tl.int64) * K + w_columns)
    columns = layout.tile_columns(T.X_VECTOR, T)
    x_rows = tl.minimum(layout.tile_rows(T.BLOCK_R, T), rows - 1)
    inputs = x_ptr + (x_rows * K + columns)

    if scale_ptr is not None and not T.AMD:
        scales = _scales(scale_ptr, features, x_ptr, T)
    squares, scale = 0.0, 0.0
    if HAS_NORM:
        # Every row lane reads the weights of the norm: the same lanes as x, so that nothing has to move.
        norms = norm_ptr + (layout.tile_rows(T.ROW_LANES, T) * 0 + columns)
        squares = tl.sum(tl.zeros(inputs.shape, tl.float32), 5, keep_dims=True)
        if SCALE_FIRST:
            scale = _norm_scale(squares, inputs, columns, EPS, K, T)

    if T.STAGES > 0:
        NORM: tl.constexpr = (2 if SCALE_FIRST else 1) if HAS_NORM else 0
        acc, squares = _sum_staged(x_ptr + x_rows * K, norm_ptr, weight_ptr, weight_rows, squares, scale, K, NORM, T)
    else:
        x_tiles = (_load(inputs, columns, K, EVEN_K, "evict_last", ""),)
        if HAS_NORM and X_AHEAD > 1:
            norm_tiles = (_load(norms, columns, K, EVEN_K, "evict_last", ""),)
        for step in tl.static_range(1, X_AHEAD):
            if step < STEPS:
                first = step * STEP
                x_tiles = x_tiles + (_load(inputs + first, columns + first, K, EVEN_K, "evict_last", ""),)  # type: ignore
                if HAS_NORM:
                    norm_tiles = norm_tiles + (_load(norms + first, columns + first, K, EVEN_K, "evict_last", ""),)  # type: ignore
        zero = 0.0
        if X_AHEAD > 1:
            zero = _zero_behind_loads(x_ptr, T.USE_PDL)
        ROWS: tl.constexpr = T.BLOCK_N if T.W_FIRST else T.BLOCK_R
        acc = tl.full((T.SPLIT_K, ROWS, T.BLOCK_N + T.BLOCK_R - ROWS), zero, tl.float32)
        for step in tl.static_range(STEPS):
            x = x_tiles[0]
            x_tiles = x_tiles[1:]  # type: ignore[assignment]
            if X_AHEAD == 1 and step + 1 < STEPS:
                ahead = (step + 1) * STEP
                x_tiles = (_load(inputs + ahead, columns + ahead, K, EVEN_K, "evict_last", ""),)
            if HAS_NORM:
                if X_AHEAD > 1:
                    norm = norm_tiles[0].to(tl.float32)
                    norm_tiles = norm_tiles[1:]  # type: ignore[assignment]
                else:
                    norm = _load(norms + step * STEP, columns + step * STEP, K, EVEN_K, "evict_last", "").to(tl.float32)
                x, squares = _normed(x, norm, squares, scale, SCALE_FIRST, T)
            x = layout.operand(x, T.BLOCK_R, T.X_VECTOR, T.CHUNKS, T)
            w = layout.operand(_widen(w_tiles[0], x.dtype, T), T.BLOCK_N, T.VECTOR, T.CHUNKS, T)
            acc = _multiply(x, w, acc, T)
            w_tiles = w_tiles[1:]
            if X_AHEAD > 1 and step + X_AHEAD < STEPS:
                ahead = (step + X_AHEAD) * STEP
                x_tiles = x_tiles + (_load(inputs + ahead, columns + ahead, K, EVEN_K, "evict_last", ""),)  # type: ignore
                if HAS_NORM:
                    norm_tiles = norm_tiles + (_load(norms + ahead, columns + ahead, K, EVEN_K, "evict_last", ""),)  # type: ignore
            if step + T.DEPTH < STEPS:
                ahead = (step + T.DEPTH) * STEP
                w_tiles = w_tiles + (_load(weights + ahead, w_columns + ahead, K, EVEN_K, "evict_first", STREAM),)
            if T.FENCE and (step + T.DEPTH < STEPS or (X_AHEAD > 1 and step + X_AHEAD < STEPS)):
                tl.debug_barrier()
            if X_AHEAD == 0 and step + 1 < STEPS:
                ahead = (step + 1) * STEP
                x_tiles = (_load(inputs + ahead, columns + ahead, K, EVEN_K, "evict_last", ""),)
    total = tl.trans(tl.sum(acc, 0)) if T.W_FIRST else tl.sum(acc, 0)
    if HAS_NORM and not SCALE_FIRST:
        scale = tl.rsqrt(layout.sum_columns(squares, T) / K + EPS)
        total *= layout.row_vector(scale, T.BLOCK_R)[:, None]
    if scale_ptr is not None:
        if T.AMD:
            scales = _scales(scale_ptr, features, x_ptr, T)
        total *= scales[None, :]
    return total


def lanes(dtype: torch.dtype, arch: str, weight_bits: int | None = None) -> dict[str, int]:
    """Return the constants that the hardware dictates: where its matrix instruction wants an operand, and options."""
    int8 = weight_bits == 8
    if not arch.startswith("gfx"):
        pdl = int(arch.startswith("sm_") and int(arch[3:]) >= 90)
        nvidia = {"ROW_LANES": 8, "K_LANES": 4, "K_INNER": 1, "FENCE": 1, "AMD": 0, "USE_PDL": pdl}
        # Four int8 are a register, and the compiler pairs registers, not columns, with the instruction's operand.
        nvidia |= {"INSTR_VECTOR": 4 if int8 else 2, "W_FIRST": int(int8), "PTX": int(arch.startswith("sm_"))}
        return nvidia | ({"launch_pdl": 1} if pdl else {})
    wave = 64 if arch.startswith("gfx9") else 32
    instr_vector = 1
    if dtype.itemsize == 2:
        instr_vector = 4 if arch in ("gfx908", "gfx90a", "gfx942") else 8
    # The fence of RDNA's compiler waits for the loads themselves, which is the opposite of what it is for.
    amd = {"FENCE": int(wave == 64), "AMD": 1, "USE_PDL": 0, "matrix_instr_nonkdim": 16}
    return {
        "ROW_LANES": 16,
        "K_LANES": wave // 16,
        "INSTR_VECTOR": instr_vector,
        "K_INNER": 0,
        "PTX": 0,
        "W_FIRST": 0,
    } | amd


def default_config(
    op: str, dtype: torch.dtype, arch: str, *, rows: int, features: int, hidden: int, weight_bits: int | None = None
) -> dict[str, int]:
    """Return the default config of a projection: `lanes`, and the entry of `configs/*.json` that fits.

    weight_bits: 8 for weights in 8 bits; by default those of the dtype.

    Entries were chosen from the machine code: no spills, and two programs an SM up to 16 rows, so that the next
    launch's weights are on their way while this one ends. Those that name a shape were measured on an H200, for one
    guided request; o and cross_o took what was measured for cross_q. `BLOCK_R`, `BLOCK_N`, `DEPTH`, `X_AHEAD` and
    `STAGES` alone may follow the rows: the rest fixes a row's bits.
    """
    weight_bits = weight_bits or 8 * dtype.itemsize
    path = launch.default_table(arch)
    use = launch.find_entry(
        path, op, launch.facts(dtype, arch, rows=rows, features=features, hidden=hidden, weight_bits=weight_bits)
    )
    if use is None:
        raise ValueError(f"{path}: {op}: no entry for {rows} rows of {dtype}, {features} features, hidden {hidden}")
    vectors = {"VECTOR": 128 // weight_bits, "X_VECTOR": 16 // dtype.itemsize}
    common = {**vectors, "num_warps": use["SPLIT_K"], "num_stages": 1}
    return {"STAGES": 0, **use, **common, **lanes(dtype, arch, weight_bits)}


OPS = ("rms_norm_linear", "linear_residual", "rms_norm_glu", "codebook_logits")
# The cache of configurations takes the function as a part of its key: one object for each op.
_DEFAULTS = {op: functools.partial(default_config, op) for op in OPS}


def configuration(op: str, x: Tensor, values: Tensor) -> tuple[Tile, dict[str, int]]:
    """Return the tile of one launch of `op`, and its compile options: see `launcher.configuration`."""
    rows, hidden = x.shape
    shape = {"rows": rows, "features": values.shape[0], "hidden": hidden, "weight_bits": 8 * values.itemsize}
    options = launch.configuration(op, _DEFAULTS[op], x.dtype, x.device, **shape)
    options["ROW_BLOCKS"] = triton.cdiv(rows, options["BLOCK_R"])
    return Tile(*(options.pop(name) for name in Tile._fields)), options


def parts(weight: Weight, name: str = "weight") -> tuple[Tensor, Tensor | None]:
    """Return the tensors that a kernel reads of a weight: `[features, hidden]`, and the scales of one in 8 bits.

    Raises TypeError, naming the argument, for one that is laid out for a CPU.
    """
    if isinstance(weight, Int8Weight):
        return weight.values, weight.scales
    if isinstance(weight, Tensor):
        return weight, None
    raise TypeError(f"{name}: {weight} is laid out for a CPU; use a tensor or an Int8Weight")


def check(rows: int, named: Mapping[str, tuple[Weight, tuple[int, ...]]], out_dtype: torch.dtype | None = None) -> None:
    """Raise ValueError or TypeError naming the argument that the kernels cannot take.

    named: each tensor with the shape it must have, x first. Rows 1 to 64, hidden size (the last axis of x) a multiple
    of 16, everything contiguous, 16-byte aligned, on one device and of one dtype (float32, float16 or bfloat16), but
    for `out` if it must be of out_dtype, and for an `Int8Weight`, which holds int8 and float32.
    """
    tensors: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype | None]] = {}
    for name, (weight, shape) in named.items():
        values, scales = parts(weight, name)
        tensors[name] = (values, shape, out_dtype if name == "out" else None)
        if scales is not None:
            tensors[name] = (values, shape, torch.int8)
            tensors[f"scales of {name}"] = (scales, shape[:1], torch.float32)
    x = next(iter(tensors.values()))[0]
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x: dtype {x.dtype} is not supported, use float32, float16 or bfloat16")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"x: {rows} rows, one launch takes 1 to {MAX_ROWS}")
    if x.shape[-1] % 16:
        raise ValueError(f"x: width {x.shape[-1]} is not a multiple of 16")
    for name, (tensor, shape, dtype) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
        expected = dtype or x.dtype
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
