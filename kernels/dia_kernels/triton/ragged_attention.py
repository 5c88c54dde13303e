"""ragged_attention: attention of whole sequences, packed one after another, to packed or paged keys and values.

    out[i] = softmax(scale * q[i] . k[t]) v[t] over the keys t that query i sees     # scale 1.0 in Dia

One program per (tile of one sequence's queries, query head) goes over the keys with a running softmax, so no score
leaves the chip. Tiles start at the beginning of their sequence: a sequence's result is the same to the bit in any
company. The grid has room for the most tiles that so many tokens and sequences can have; programs beyond leave.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch
from dia_kernels.triton.paged_attention import mix, scaled, scores


@triton.jit
def _own_tile(starts_ptr, index, sequences, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the sequence of tile `index`, or `sequences` and more if there is none, and its first query in it."""
    i = tl.arange(0, BLOCK_S)
    real = i < sequences
    length = tl.load(starts_ptr + i + 1, mask=real, other=0) - tl.load(starts_ptr + i, mask=real, other=0)
    tiles = tl.cdiv(length, BLOCK_M)
    sequence = tl.sum((tl.cumsum(tiles, 0) <= index).to(tl.int32), 0)
    return sequence, (index - tl.sum(tl.where(i < sequence, tiles, 0), 0)) * BLOCK_M


@triton.jit
def _ragged_attention(
    q_ptr,  # [tokens, HEADS, HEAD_DIM], contiguous along the last axis, as k and v
    k_ptr,  # [tokens, KV_HEADS, HEAD_DIM], or [pages, KV_HEADS, PAGE, HEAD_DIM] and contiguous
    v_ptr,  # as k_ptr
    starts_ptr,  # [sequences + 1] int32
    table_ptr,  # [sequences, max_pages] int32, or unused
    kv_lengths_ptr,  # [sequences] int32, or unused
    out_ptr,  # [tokens, HEADS, HEAD_DIM] contiguous
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    sequences,
    max_pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,  # 0: packed
    CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    sequence, first = _own_tile(starts_ptr, tl.program_id(0), sequences, BLOCK_S, BLOCK_M)
    if sequence >= sequences:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    begin = tl.load(starts_ptr + sequence).to(tl.int64)
    queries = (tl.load(starts_ptr + sequence + 1) - begin).to(tl.int32)
    keys = queries
    if PAGE > 0:
        keys = tl.load(kv_lengths_ptr + sequence)
        table_ptr += sequence.to(tl.int64) * max_pages
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    used = d < HEAD_DIM
    asked = (m < queries)[:, None] & used[None, :]
    q_at = (begin + m)[:, None] * stride_qt + head.to(tl.int64) * stride_qh + d[None, :]
    q = tl.load(q_ptr + q_at, mask=asked, other=0.0)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, keys - queries + first + BLOCK_M)
    for start in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        t = start + n
        live = t < keys
        if PAGE > 0:
            page = tl.load(table_ptr + t // PAGE, mask=live, other=0).to(tl.int64)
            k_at = ((page * KV_HEADS + kv_head) * PAGE + t % PAGE) * HEAD_DIM
            v_at = k_at
        else:
            k_at = (begin + t) * stride_kt + kv_head.to(tl.int64) * stride_kh
            v_at = (begin + t) * stride_vt + kv_head.to(tl.int64) * stride_vh
        mask = live[:, None] & used[None, :]
        k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + v_at[:, None] + d[None, :], mask=mask, other=0.0)
        score = scaled(scores(q, k, DOT), SCALE)
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (t[None, :] <= (keys - queries + m)[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + mix(weight, v, DOT)
        peak = higher
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_at = ((begin + m) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=asked)


def _default_config(dtype: torch.dtype, arch: str, *, head_dim: int, paged: int) -> dict[str, int]:
    """Return queries and keys per tile, stages of loads, and warps; chosen so that nothing spills at head_dim 128.

    Must not depend on how many sequences there are, or a sequence's result would.
    """
    width = triton.next_power_of_2(head_dim)
    config = {"DOT": 1, "num_warps": 4, "STAGES": 1}
    if arch.startswith("gfx9"):
        config["matrix_instr_nonkdim"] = 16
    if dtype == torch.float32:
        if arch.startswith("gfx1"):  # no matrix units for it: query by query
            return {**config, "BLOCK_M": max(1, 512 // width), "BLOCK_N": 32, "DOT": 0, "num_warps": 8}
        warps = 4 if arch.startswith("gfx9") else 8
        keys = 32 if width <= 128 and arch != "sm_80" else 16
        return {**config, "BLOCK_M": 16, "BLOCK_N": keys, "num_warps": warps}
    if arch.startswith("sm_"):
        config["STAGES"] = 2
    if not arch.startswith(("sm_9", "sm_10", "gfx9")):
        config["num_warps"] = 8
    if arch.startswith("gfx1"):
        return {**config, "BLOCK_M": 32, "BLOCK_N": 32}
    # Some compilers for these find too few registers for 64 queries.
    queries = 32 if arch.startswith(("sm_86", "sm_89", "sm_12")) else 64
    return {**config, "BLOCK_M": queries, "BLOCK_N": 64 if width <= 128 else 32}


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"q: head_dim {head_dim}, needs a multiple of 16 from 16 to 256")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: {heads} heads, needs a multiple of the {kv_heads} kv heads")
    if k.shape != v.shape or k.shape[-1] != head_dim:
        raise ValueError(f"k, v: {tuple(k.shape)}, {tuple(v.shape)}, need the same shape, ending in {head_dim}")
    for name, tensor in (("k", k), ("v", v), ("out", out)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, needs q's {q.dtype}")
    if out.shape != (tokens, heads * head_dim):
        raise ValueError(f"out: {tuple(out.shape)}, needs ({tokens}, {heads * head_dim})")
    if starts.ndim != 1 or starts.dtype != torch.int32 or not len(starts):
        raise ValueError(f"starts: {starts.dtype} {tuple(starts.shape)}, needs int32 [sequences + 1]")
    launch.require_contiguous(starts=starts, out=out)
    if block_table is None:
        if kv_lengths is not None:
            raise ValueError("kv_lengths: given without block_table; packed keys are cut by starts")
        if k.shape[0] != tokens:
            raise ValueError(f"k: {k.shape[0]} tokens, needs q's {tokens}")
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.stride(-1) != 1:
                raise ValueError(f"{name}: has strides {tensor.stride()}; the last axis must be contiguous")
        return
    sequences = len(starts) - 1
    if kv_lengths is None or kv_lengths.shape != (sequences,) or kv_lengths.dtype != torch.int32:
        raise ValueError(f"kv_lengths: needs int32 [{sequences}] with a block_table")
    if block_table.ndim != 2 or block_table.shape[0] != sequences or block_table.dtype != torch.int32:
        found = f"{block_table.dtype} {tuple(block_table.shape)}"
        raise ValueError(f"block_table: {found}, needs int32 [{sequences}, max_pages]")
    if q.stride(-1) != 1:
        raise ValueError(f"q: has strides {q.stride()}; the last axis must be contiguous")
    launch.require_contiguous(k=k, v=v, block_table=block_table, kv_lengths=kv_lengths)


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    *,
    causal: bool,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """As `dia_kernels.reference.ragged_attention`; q, and packed k and v, of any strides along tokens and heads.

    Pages, block_table, kv_lengths, starts and out contiguous. Raises ValueError naming the argument.
    """
    _check(q, k, v, starts, out, block_table, kv_lengths)
    tokens, heads, head_dim = q.shape
    sequences = len(starts) - 1
    if tokens == 0 or sequences == 0:
        return out
    shape = {"head_dim": head_dim, "paged": int(block_table is not None)}
    chosen = launch.configuration("ragged_attention", _default_config, q.dtype, q.device, **shape)
    # Every sequence but a multiple of the tile's length has one tile that is not full.
    tiles = tokens // chosen["BLOCK_M"] + min(sequences, tokens)
    launch.run(
        _ragged_attention,
        (tiles, heads),
        q,
        k,
        v,
        starts,
        block_table,
        kv_lengths,
        out,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        sequences,
        0 if block_table is None else block_table.shape[1],
        HEADS=heads,
        KV_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        PAGE=0 if block_table is None else k.shape[2],
        CAUSAL=causal,
        SCALE=float(scale),
        BLOCK_S=triton.next_power_of_2(sequences),
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
        **chosen,
    )
    return out
