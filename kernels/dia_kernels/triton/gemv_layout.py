"""The tile that a decode projection loads: its constants, its six axes, and its way to the matrix instruction.

A tile is one step of one operand: `ROWS` rows (features of the weights, or rows of x) by
`SPLIT_K * CHUNKS * K_LANES * VECTOR` columns. Its axes, from the slowest to the fastest to get a register or a lane:

    [CHUNKS, ROWS // ROW_LANES, SPLIT_K, ROW_LANES, K_LANES, VECTOR]        K_INNER = 1 (NVIDIA)
    [CHUNKS, ROWS // ROW_LANES, SPLIT_K, K_LANES, ROW_LANES, VECTOR]        K_INNER = 0 (AMD)
     registers  registers       warps    lanes, outer and inner  one 128-bit load

On NVIDIA in 16 bit, with 8 warps, 2 chunks and 16 rows; a cell is what one lane loads at once, 8 columns:

               warp 0                                   warp 1              ..   warp 7
    column     0    8    16   24  | 32   40   48   56  | 64 ..                   448 ..        511
              +----+----+----+----+----+----+----+----+----+----+--        --+----+----+----+----+
    row 0     | L0 | L1 | L2 | L3 | L0 | L1 | L2 | L3 | L0 | L1 |            | L0 | L1 | L2 | L3 |
    row 1     | L4 | L5 | L6 | L7 | L4 | L5 | L6 | L7 | L4 | L5 |            | L4 | L5 | L6 | L7 |   group 0
     ..       |    ROW_LANES = 8 rows, K_LANES = 4    |                                          |
    row 7     | L28| L29| L30| L31| L28| L29| L30| L31| L28| L29|            | L28| L29| L30| L31|
              +----+----+----+----+----+----+----+----+----+----+--        --+----+----+----+----+
    row 8     | L0 | L1 | L2 | L3 | L0 | L1 | L2 | L3 |  the same lanes, the next registers      |   group 1
     ..       |      chunk 0      |      chunk 1      |
              +-------------------+-------------------+

The matrix instruction multiplies 16 columns at a time and wants `INSTR_VECTOR` = 2 neighbouring ones from each lane, so
that in its operand lane 0 holds columns 0, 1 and lane 1 holds columns 2, 3. Here lane 0 holds 0 to 7. Which columns
meet in one instruction does not matter to a sum, as long as both operands agree. So `operand` renames the columns
instead of moving them: pieces of two, of all four lanes, are neighbours in the operand:

    loaded by    L0: 0 1|2 3|4 5|6 7    L1: 8 9|10 11|12 13|14 15    L2: 16 17|..    L3: 24 25|..
    operand      0 1  8 9  16 17  24 25 | 2 3  10 11  18 19  26 27 | 4 5  12 13  20 21  28 29 | 6 7  14 15  22 23  30 31
                 L0   L1   L2     L3    | L0   L1     L2     L3    | ..

Nothing moves between lanes or through shared memory, and each load is as wide as a load can be.

Weights in 8 bits come 16 at a time (`VECTOR`), activations in 16 bits 8 at a time (`X_VECTOR`): a tile of x has twice
the chunks, of which two follow one another where one of the weights lies:

    weights      L0: 0 .. 15                L1: 16 .. 31               L2: 32 ..         one chunk
    x            L0: 0 .. 7                 L1: 16 .. 23               L2: 32 ..         its first half
                 L0: 8 .. 15                L1: 24 .. 31               L2: 40 ..         its second half
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Compile-time constants of a projection: the work of one program, and how its loads lie in lanes.

    `SPLIT_K`, `CHUNKS`, `ROW_LANES`, `K_LANES`, `VECTOR`, `INSTR_VECTOR` and `K_INNER` fix the order of a sum, and so
    the bits of a row. The others do not.
    """

    BLOCK_N: int  # output features of a program
    BLOCK_R: int  # rows of a program
    ROW_BLOCKS: int  # programs that share the same weights, each with BLOCK_R rows
    SPLIT_K: int  # warps along the columns; also num_warps
    CHUNKS: int  # 128-bit loads of a lane in a step, for each group of rows
    DEPTH: int  # steps of weights in flight
    ROW_LANES: int  # lanes along the rows
    K_LANES: int  # lanes along the columns
    VECTOR: int  # weights of a 128-bit load
    X_VECTOR: int  # activations of a 128-bit load; VECTOR, or a part of it where weights are narrower
    INSTR_VECTOR: int  # neighbouring columns that the matrix instruction takes from a lane
    K_INNER: int  # 1: neighbouring lanes hold neighbouring columns; 0: neighbouring rows
    FENCE: int  # 1: a barrier behind each group of loads keeps the compiler from moving them down
    X_AHEAD: int  # steps of x in flight; 0: one, requested behind the product
    AMD: int  # 1: an AMD GPU
    USE_PDL: int  # 1: programmatic dependent launch
    W_FIRST: int  # 1: the weights are the first operand of the matrix instruction, x is the second
    PTX: int  # 1: weights in 8 bits are widened by NVIDIA's own instructions
    STAGES: int  # chunks on their way through shared memory at a time; 0: weights stay in registers


# Triton gives lanes, then warps, then registers to the axes of a tile: from the last one, up to 3.6 from the first.
_FROM_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def program_tile(T: tl.constexpr):
    """Return this program's tile of weights, and its first row: programs of the same weights follow one another."""
    if T.ROW_BLOCKS > 1:
        return tl.program_id(0) // T.ROW_BLOCKS, tl.program_id(0) % T.ROW_BLOCKS * T.BLOCK_R
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
def tile_columns(VECTOR: tl.constexpr, T: tl.constexpr):
    """Column within its step of every element of a tile that is loaded `VECTOR` elements at a time."""
    PARTS: tl.constexpr = T.VECTOR // VECTOR
    chunk = _axis(T.CHUNKS * PARTS, 4)
    lane = (_axis(T.SPLIT_K, 2) * T.CHUNKS + chunk // PARTS) * T.K_LANES + _axis(T.K_LANES, 0 if T.K_INNER else 1)
    return lane * T.VECTOR + chunk % PARTS * VECTOR + tl.arange(0, VECTOR)[None, None, None, None, None, :]


@triton.jit
def chunk_columns(T: tl.constexpr):
    """Column within its step of every element of the first chunk of each warp, where x and weights are as wide."""
    lane = _axis(T.SPLIT_K, 2) * T.CHUNKS * T.K_LANES + _axis(T.K_LANES, 0 if T.K_INNER else 1)
    return lane * T.VECTOR + tl.arange(0, T.VECTOR)[None, None, None, None, None, :]


@triton.jit
def in_chunk(tile, chunk, T: tl.constexpr):
    """A tile of one chunk as the one numbered `chunk` of a step; the others are zero."""
    return tl.where(_axis(T.CHUNKS, 4) == chunk, tile, 0.0)


@triton.jit
def tile_rows(ROWS: tl.constexpr, T: tl.constexpr):
    """Row of every element of a tile of `ROWS` rows."""
    return _axis(ROWS // T.ROW_LANES, 3) * T.ROW_LANES + _axis(T.ROW_LANES, 1 if T.K_INNER else 0)


@triton.jit
def operand(tile, ROWS: tl.constexpr, VECTOR: tl.constexpr, CHUNKS: tl.constexpr, T: tl.constexpr):
    """`[SPLIT_K, ROWS, columns]` of a loaded tile, the columns in the order in which the lanes feed the instruction."""
    groups: tl.constexpr = ROWS // T.ROW_LANES
    inner: tl.constexpr = T.K_LANES if T.K_INNER else T.ROW_LANES
    outer: tl.constexpr = T.ROW_LANES if T.K_INNER else T.K_LANES
    pieces: tl.constexpr = VECTOR // T.INSTR_VECTOR
    chunks: tl.constexpr = CHUNKS * (T.VECTOR // VECTOR)
    if _FROM_FIRST:
        tile = tl.reshape(tile, (inner, outer, T.SPLIT_K, groups, chunks, pieces, T.INSTR_VECTOR))
        tile = tl.permute(tile, (2, 3, 1, 4, 5, 0, 6) if T.K_INNER else (2, 3, 0, 4, 5, 1, 6))
    else:
        tile = tl.reshape(tile, (chunks, groups, T.SPLIT_K, outer, inner, pieces, T.INSTR_VECTOR))
        tile = tl.permute(tile, (2, 1, 3, 0, 5, 4, 6) if T.K_INNER else (2, 1, 4, 0, 5, 3, 6))
    return tl.reshape(tile, (T.SPLIT_K, ROWS, CHUNKS * T.K_LANES * T.VECTOR))


@triton.jit
def sum_columns(tile, T: tl.constexpr):
    """Sum over the columns of a tile whose vectors are summed up already."""
    rank: tl.constexpr = 0 if T.K_INNER else 1
    tile = tl.sum(tile, 4 if _FROM_FIRST else 0, keep_dims=True)
    tile = tl.sum(tile, rank if _FROM_FIRST else 4 - rank, keep_dims=True)
    return tl.sum(tile, 2, keep_dims=True)


@triton.jit
def row_vector(tile, ROWS: tl.constexpr):
    """`[ROWS]` of a tile that has one column."""
    if _FROM_FIRST:
        tile = tl.permute(tile, (0, 2, 4, 5, 3, 1))
    return tl.reshape(tile, (ROWS,))
