"""cross_attention: one decode step of attention to the text over its paged keys and values, in one launch.

    out = softmax(scale * q . k[0 .. length - 1]) . v[0 .. length - 1]               # scale 1.0 in Dia
    q   = round(rope(q))                             # where a table is given: the first generation of Dia

One program per (row and kv head, split of the tokens), see `paged`. Reads 2 * kv_heads * head_dim values
per token, once.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch
from dia_kernels.triton import paged_attention as paged
from dia_kernels.triton.paged_attention import (
    attend,
    finish,
    head_axis,
    keep_both_in_flight,
    load_tile,
    rotated,
    settle,
)

SPLIT = 256  # tokens, or what fits into registers: most texts are then one split, with nothing to merge


@triton.jit
def _cross_attention(
    q_ptr,  # [rows, KV_HEADS, GROUP, HEAD_DIM]
    cos_ptr,  # [positions, HEAD_DIM / 2] float32, or None: q is not rotated
    sin_ptr,  # as cos_ptr
    positions_ptr,  # [rows] int32, or None
    k_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM]
    v_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM]
    table_ptr,  # [rows, max_pages] int32
    lengths_ptr,  # [rows] int32
    out_ptr,  # [rows, KV_HEADS, GROUP, HEAD_DIM]
    partials_ptr,  # [rows, KV_HEADS, grid splits, GROUP, HEAD_DIM] float32
    stats_ptr,  # [rows, KV_HEADS, grid splits, GROUP, 2] float32
    arrivals_ptr,  # [rows, KV_HEADS] int32
    max_pages,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TARGET: tl.constexpr,
    USE_PDL: tl.constexpr,
    KV_READY: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = row_head // KV_HEADS
    kv_head = row_head % KV_HEADS
    begin = split * SPLIT
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not KV_READY:
            tl.extra.cuda.gdc_wait()
    g = tl.arange(0, BLOCK_G)
    d, paired, angle, used = head_axis(HEAD_DIM, BLOCK_D)
    grouped = (g < GROUP)[:, None] & used[None, :]
    head = (row_head * GROUP + g)[:, None] * HEAD_DIM
    at = head + d[None, :]
    t = begin + tl.arange(0, SPLIT)
    page = tl.load(table_ptr + row * max_pages + t // PAGE, mask=t // PAGE < max_pages, other=0)
    length = tl.load(lengths_ptr + row)
    if (begin >= length) & (split > 0):
        return  # see `paged`
    live = t < length
    k, v = load_tile(k_ptr, v_ptr, page, live, kv_head, d, used, KV_HEADS, PAGE, HEAD_DIM, SPLIT)
    if USE_PDL and KV_READY:
        tl.debug_barrier()
        tl.extra.cuda.gdc_wait()
    if length <= 0:
        tl.store(out_ptr + at, tl.zeros([BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty), mask=grouped)
        return

    q = tl.load(q_ptr + at, mask=grouped, other=0.0)
    if cos_ptr is not None:
        q_paired = tl.load(q_ptr + head + paired[None, :], mask=grouped, other=0.0)
        place = tl.maximum(tl.load(positions_ptr + row), 0).to(tl.int64) * (HEAD_DIM // 2) + angle
        cos = tl.load(cos_ptr + place, mask=used, other=0.0)
        sin = tl.load(sin_ptr + place, mask=used, other=0.0)
        q = settle(rotated(q, q_paired, cos[None, :], sin[None, :], d[None, :], HEAD_DIM), TARGET)
    k, v = keep_both_in_flight(k, v, TARGET)
    peak, total, acc = attend(q, k, v, live, tl.full([BLOCK_G], float("-inf"), tl.float32), SCALE, TARGET)
    splits = tl.cdiv(length, SPLIT)
    finish(
        peak, total, acc, split, splits, row_head, d, used, out_ptr, partials_ptr, stats_ptr, arrivals_ptr,
        GROUP, HEAD_DIM, BLOCK_G, CHUNK, TARGET,
    )  # fmt: skip


def _check_rotation(
    rows: int, head_dim: int, cos: torch.Tensor | None, sin: torch.Tensor | None, positions: torch.Tensor | None
) -> None:
    if cos is None or sin is None or positions is None:
        raise ValueError("cos, sin, positions: RoPE needs all three, or none of them for no RoPE")
    if cos.shape != sin.shape or cos.shape[1] != head_dim // 2 or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(f"cos, sin: {tuple(cos.shape)}, {tuple(sin.shape)}, need float32 [positions, {head_dim // 2}]")
    if positions.shape != (rows,) or positions.dtype != torch.int32:
        raise ValueError(f"positions: {positions.dtype} {tuple(positions.shape)}, needs int32 [{rows}]")
    launch.require_contiguous(cos=cos, sin=sin, positions=positions)


def cross_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    workspace: object = None,
    kv_ready: bool = False,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """As `dia_kernels.reference.cross_attention`; all tensors contiguous, `workspace` from `attention_workspace`.

    No length may exceed max_pages * page_size. Raises ValueError or TypeError naming the argument.
    """
    rows, _, _ = paged.check_pages(k_pages, v_pages, block_table, out)
    if q.shape != out.shape or q.dtype != out.dtype:
        raise ValueError(f"q: {q.dtype} {tuple(q.shape)}, needs out's {out.dtype} {tuple(out.shape)}")
    if lengths.shape != (rows,) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths: {lengths.dtype} {tuple(lengths.shape)}, needs int32 [{rows}]")
    launch.require_contiguous(q=q, lengths=lengths)
    if cos is not None or sin is not None or positions is not None:
        _check_rotation(rows, k_pages.shape[3], cos, sin, positions)
    cache = (k_pages, v_pages, block_table, lengths, out)
    paged.run("cross_attention", _cross_attention, SPLIT, (q, cos, sin, positions), cache, workspace, kv_ready, scale)
    return out
