"""rope: rotates q and k of packed tokens in place and, with pages given, stores k and v in them, in one launch.

    first, second = first * cos - second * sin, second * cos + first * sin        # halves of a head, rounded once

One program per token and group of heads, which reads its part of qkv before it overwrites any of it.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _rope(
    qkv_ptr,  # [tokens, HEADS + 2 * KV_HEADS, HEAD_DIM], rotated in place
    cos_ptr,  # [positions, HEAD_DIM / 2] float32
    sin_ptr,  # [positions, HEAD_DIM / 2] float32
    positions_ptr,  # [tokens] int32
    k_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM], or unused
    v_ptr,  # as k_ptr, or unused
    slot_mapping_ptr,  # [tokens] int64, or unused
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,  # 0: no pages
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    TURNING: tl.constexpr = HEADS + KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    angle = tl.arange(0, BLOCK_A)
    used = angle < HALF
    turning = (h < TURNING)[:, None] & used[None, :]
    real = (h < TURNING + KV_HEADS)[:, None] & used[None, :]
    at = qkv_ptr + (token * (TURNING + KV_HEADS) + h[:, None]) * HEAD_DIM + angle[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + angle, mask=used, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + angle, mask=used, other=0.0)[None, :]
    first = tl.load(at, mask=real, other=0.0)
    second = tl.load(at + HALF, mask=real, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    new_first = (wide_first * cos - wide_second * sin).to(first.dtype)
    new_second = (wide_second * cos + wide_first * sin).to(first.dtype)
    # Several threads may hold the same element: all of them have to have read it before one writes.
    tl.debug_barrier()
    tl.store(at, new_first, mask=turning)
    tl.store(at + HALF, new_second, mask=turning)
    if PAGE > 0:
        slot = tl.load(slot_mapping_ptr + token)
        kv_head = tl.where(h < TURNING, h - HEADS, h - TURNING)
        place = ((slot // PAGE * KV_HEADS + kv_head) * PAGE + slot % PAGE)[:, None] * HEAD_DIM + angle[None, :]
        is_k = turning & (h >= HEADS)[:, None] & (slot >= 0)
        is_v = real & (h >= TURNING)[:, None] & (slot >= 0)
        tl.store(k_ptr + place, new_first, mask=is_k)
        tl.store(k_ptr + place + HALF, new_second, mask=is_k)
        tl.store(v_ptr + place, first, mask=is_v)
        tl.store(v_ptr + place + HALF, second, mask=is_v)


def _default_config(dtype: torch.dtype, arch: str, *, heads: int, head_dim: int) -> dict[str, int]:
    """Heads per program, counting those of q, k and v, and warps."""
    return {"BLOCK_H": min(32, triton.next_power_of_2(heads)), "num_warps": 4}


def _check_pages(
    qkv: torch.Tensor,
    kv_heads: int,
    head_dim: int,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        found = f"{pages.dtype} {tuple(pages.shape)}"
        if pages.ndim != 4 or pages.shape[1] != kv_heads or pages.shape[3] != head_dim or pages.dtype != qkv.dtype:
            raise ValueError(f"{name}: {found}, needs {qkv.dtype} [pages, {kv_heads}, page_size, {head_dim}]")
    if v_pages.shape != k_pages.shape:
        raise ValueError(f"v_pages: {tuple(v_pages.shape)}, needs k_pages' {tuple(k_pages.shape)}")
    if slot_mapping.shape != qkv.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping: {slot_mapping.dtype} {tuple(slot_mapping.shape)}, needs int64 [{qkv.shape[0]}]"
        )
    launch.require_contiguous(k_pages=k_pages, v_pages=v_pages, slot_mapping=slot_mapping)


def rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    kv_heads: int,
    k_pages: torch.Tensor | None = None,
    v_pages: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `dia_kernels.reference.rope`; all tensors contiguous. Raises ValueError naming the argument."""
    tokens, width = qkv.shape
    head_dim = 2 * cos.shape[1]
    heads = width // head_dim - 2 * kv_heads
    if head_dim % 16 or width % head_dim or heads < 0:
        wanted = f"(heads + 2 x {kv_heads}) x {head_dim}, the latter a multiple of 16"
        raise ValueError(f"qkv: {width} columns, needs {wanted}")
    if cos.shape != sin.shape or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(f"cos, sin: {tuple(cos.shape)}, {tuple(sin.shape)}, need the same shape in float32")
    if positions.shape != (tokens,) or positions.dtype != torch.int32:
        raise ValueError(f"positions: {positions.dtype} {tuple(positions.shape)}, needs int32 [{tokens}]")
    launch.require_contiguous(qkv=qkv, cos=cos, sin=sin, positions=positions)
    page_size = 0
    if k_pages is not None and v_pages is not None and slot_mapping is not None:
        _check_pages(qkv, kv_heads, head_dim, k_pages, v_pages, slot_mapping)
        page_size = k_pages.shape[2]
    if tokens == 0:
        return qkv
    every = heads + 2 * kv_heads
    chosen = launch.configuration("rope", _default_config, qkv.dtype, qkv.device, heads=every, head_dim=head_dim)
    launch.run(
        _rope,
        (tokens, triton.cdiv(every, chosen["BLOCK_H"])),
        qkv,
        cos,
        sin,
        positions,
        k_pages,
        v_pages,
        slot_mapping,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_A=triton.next_power_of_2(head_dim // 2),
        enable_fp_fusion=True,
        **chosen,
    )
    return qkv
