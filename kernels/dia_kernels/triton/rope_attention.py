"""rope_attention: one decode step of causal self-attention over the paged cache, in one launch.

    q, k = round(rope(q)), round(rope(k));  k_pages, v_pages[position] = k, v
    out  = softmax(scale * q . k[0 .. position]) . v[0 .. position]                  # scale 1.0 in Dia

One program per (row and kv head, split of the tokens), see `paged`. The program whose split holds the position rotates
the new k, stores it and v, and alone attends to the new token, from its registers: nobody reads the slot being written.
Reads 2 * kv_heads * head_dim values per cached token, once; writes as many for the new one.
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
    scaled,
    settle,
)

SPLIT = 64  # tokens; the partial sums of a group of 4 heads are then 6 % of the K and V they stand for


@triton.jit
def _rope_attention(
    qkv_ptr,  # [rows, GROUP * KV_HEADS + 2 * KV_HEADS, HEAD_DIM]
    cos_ptr,  # [positions, HEAD_DIM / 2] float32
    sin_ptr,  # [positions, HEAD_DIM / 2] float32
    k_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM]
    v_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM]
    table_ptr,  # [rows, max_pages] int32
    positions_ptr,  # [rows] int32
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
    table_ptr += row * max_pages
    t = begin + tl.arange(0, SPLIT)
    page = tl.load(table_ptr + t // PAGE, mask=t // PAGE < max_pages, other=0)
    position = tl.load(positions_ptr + row)
    if (begin > position) & (split > 0):
        return  # see `paged`
    live = t < position
    k, v = load_tile(k_ptr, v_ptr, page, live, kv_head, d, used, KV_HEADS, PAGE, HEAD_DIM, SPLIT)
    turned = used & (position >= 0)
    cos = tl.load(cos_ptr + position.to(tl.int64) * (HEAD_DIM // 2) + angle, mask=turned, other=0.0)
    sin = tl.load(sin_ptr + position.to(tl.int64) * (HEAD_DIM // 2) + angle, mask=turned, other=0.0)
    new_page = tl.load(table_ptr + position // PAGE, mask=position >= 0, other=0).to(tl.int64)
    if USE_PDL and KV_READY:
        tl.debug_barrier()
        tl.extra.cuda.gdc_wait()
    if position < 0:
        nothing = tl.zeros([BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row_head * GROUP + g[:, None]) * HEAD_DIM + d[None, :], nothing, mask=grouped)
        return

    qkv_ptr += row * ((GROUP + 2) * KV_HEADS * HEAD_DIM)
    head = (kv_head * GROUP + g)[:, None] * HEAD_DIM
    q = tl.load(qkv_ptr + head + d[None, :], mask=grouped, other=0.0)
    q_paired = tl.load(qkv_ptr + head + paired[None, :], mask=grouped, other=0.0)
    owner = position < begin + SPLIT
    new = used & owner
    new_ptr = qkv_ptr + (GROUP * KV_HEADS + kv_head) * HEAD_DIM
    new_k = tl.load(new_ptr + d, mask=new, other=0.0)
    new_k_paired = tl.load(new_ptr + paired, mask=new, other=0.0)
    new_v = tl.load(new_ptr + KV_HEADS * HEAD_DIM + d, mask=new, other=0.0)
    k, v = keep_both_in_flight(k, v, TARGET)

    q = settle(rotated(q, q_paired, cos[None, :], sin[None, :], d[None, :], HEAD_DIM), TARGET)
    new_k = rotated(new_k, new_k_paired, cos, sin, d, HEAD_DIM)
    slot = ((new_page * KV_HEADS + kv_head) * PAGE + position % PAGE) * HEAD_DIM + d
    tl.store(k_ptr + slot, new_k, mask=new)
    tl.store(v_ptr + slot, new_v, mask=new)

    new_score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1)
    new_score = tl.where(owner, scaled(new_score, SCALE), float("-inf"))
    peak, total, acc = attend(q, k, v, live, new_score, SCALE, TARGET)
    new_weight = tl.exp(new_score - peak)
    total += new_weight
    acc += new_weight[:, None] * new_v.to(tl.float32)[None, :]
    finish(
        peak,
        total,
        acc,
        split,
        position // SPLIT + 1,
        row_head,
        d,
        used,
        out_ptr,
        partials_ptr,
        stats_ptr,
        arrivals_ptr,
        GROUP,
        HEAD_DIM,
        BLOCK_G,
        CHUNK,
        TARGET,
    )


def rope_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    workspace: object = None,
    kv_ready: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    """As `dia_kernels.reference.rope_attention`; all tensors contiguous, `workspace` from `attention_workspace`.

    Every position must be below max_pages * page_size. Raises ValueError or TypeError naming the argument.
    """
    rows, heads, kv_heads = paged.check_pages(k_pages, v_pages, block_table, out)
    head_dim = k_pages.shape[3]
    if qkv.shape != (rows, (heads + 2 * kv_heads) * head_dim) or qkv.dtype != out.dtype:
        wanted = f"{out.dtype} [{rows}, {(heads + 2 * kv_heads) * head_dim}]"
        raise ValueError(f"qkv: {qkv.dtype} {tuple(qkv.shape)}, needs {wanted}")
    if cos.shape != sin.shape or cos.shape[1] != head_dim // 2 or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(f"cos, sin: {tuple(cos.shape)}, {tuple(sin.shape)}, need float32 [positions, {head_dim // 2}]")
    if positions.shape != (rows,) or positions.dtype != torch.int32:
        raise ValueError(f"positions: {positions.dtype} {tuple(positions.shape)}, needs int32 [{rows}]")
    launch.require_contiguous(qkv=qkv, cos=cos, sin=sin, positions=positions)
    cache = (k_pages, v_pages, block_table, positions, out)
    paged.run("rope_attention", _rope_attention, SPLIT, (qkv, cos, sin), cache, workspace, kv_ready, scale)
    return out
