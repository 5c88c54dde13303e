"""Attention over pages and over packed sequences, with RoPE. The scale of Dia is 1.0 throughout (docs/dia.md).

A page pool is `[pages, kv_heads, page_size, head_dim]`, one for K and one for V; token `t` of a sequence lives in
page `block_table[sequence, t // page_size]` at offset `t % page_size`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_workspace(rows: int, heads: int, head_dim: int, max_length: int, device: torch.device) -> None:
    """Return scratch memory for `rope_attention` and `cross_attention`: None in torch, which needs none.

    Args:
        rows: Most rows of a call.
        heads: Query heads.
        head_dim: Of a head.
        max_length: Most tokens that a block table has room for.
        device: Of the tensors.
    """
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE in fp32, cast back. x: `[n, heads, head_dim]`; cos, sin: `[n, head_dim / 2]` float32."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _gather(pages: Tensor, block_table: Tensor, length: int) -> Tensor:
    """`[kv_heads, length, head_dim]` in float32: the first `length` tokens of one sequence, and no more than those.

    Whole pages are picked first: that is a copy of memory, which is several times faster than picking their heads.
    """
    size = pages.shape[2]
    used = pages.index_select(0, block_table[: -(-length // size)])
    wide = used.new_empty(used.transpose(0, 1).shape, dtype=_wide(pages.dtype)).copy_(used.transpose(0, 1))
    return wide.view(pages.shape[1], -1, pages.shape[3])[:, :length]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute in."""
    return torch.promote_types(dtype, torch.float32)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """q: `[heads, n, head_dim]`, k, v: `[kv_heads, m, head_dim]`, the queries last -> `[heads, n, head_dim]`.

    On a CPU in float32: products of 16-bit numbers are several times slower there, and less exact.
    """
    n, m, groups = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    dtype = _wide(q.dtype) if q.device.type == "cpu" else q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not causal or n == 1:
        folded = q.reshape(k.shape[0], groups * n, q.shape[2])
        return F.scaled_dot_product_attention(folded[None], k[None], v[None], scale=scale)[0].reshape(q.shape)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=mask is None, scale=scale)[0]


def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    out: Tensor,
    workspace: object = None,
    kv_ready: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Make one decode step of causal self-attention: rotate q and k, store k and v, attend to `0..position`.

    q and k are rotated in fp32 and rounded once to their dtype; scores, softmax and the weighted sum are accumulated in
    fp32.

    Args:
        qkv: `[rows, (heads + 2 * kv_heads) * head_dim]`, q first.
        cos: `[max_positions, head_dim / 2]` float32.
        sin: As cos.
        k_pages: `[pages, kv_heads, page_size, head_dim]`, written in place at `positions[row]`.
        v_pages: As k_pages.
        block_table: `[rows, max_pages]` int32, the pages of each row.
        positions: `[rows]` int32, the new token's index: the row attends to `positions[row] + 1` tokens. At -1
            the row is inert: nothing is written and its `out` is 0.
        out: `[rows, heads * head_dim]`, written.
        workspace: Result of `attention_workspace`.
        kv_ready: The caller's word that nothing but qkv comes from a launch that may still run when this one begins
            (docs/kernels.md): a kernel may then read the rest early.
        scale: What scores are multiplied by, in fp32; 1.0 in Dia.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    kv_heads, page_size, head_dim = k_pages.shape[1:]
    heads = out.shape[1] // head_dim
    at = positions.long().clamp(min=0)
    split = qkv.view(qkv.shape[0], -1, head_dim)
    turned = _rotate(split[:, : heads + kv_heads], cos[at], sin[at])
    q, k, v = turned[:, :heads], turned[:, heads:], split[:, heads + kv_heads :]
    lengths = [position + 1 for position in positions.tolist()]
    active = positions >= 0
    page = block_table.gather(1, (at // page_size)[:, None])[active, 0].long()
    offset = (at % page_size)[active]
    k_pages[page, :, offset] = k[active]
    v_pages[page, :, offset] = v[active]
    return _attend_each(q.flatten(1), k_pages, v_pages, block_table, lengths, out, scale)


def cross_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    workspace: object = None,
    kv_ready: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Make one decode step of cross-attention over the text, conditional rows only.

    Args:
        q: `[batch, heads * head_dim]`.
        k_pages: `[pages, kv_heads, page_size, head_dim]`.
        v_pages: As k_pages.
        block_table: `[batch, max_pages]` int32, the pages of each row.
        lengths: `[batch]` int32, tokens of text; at 0 `out` is 0.
        out: `[batch, heads * head_dim]`, written.
        workspace: Result of `attention_workspace`.
        kv_ready: As for `rope_attention`; here nothing but q comes from a launch that may still run.
        cos: `[max_positions, head_dim / 2]` float32. With it q is rotated in fp32 and rounded once to its dtype, as the
            first generation of Dia does, whose k were rotated when they were stored. None: no RoPE.
        sin: As cos; required with it.
        positions: `[batch]` int32, below 0 for inert rows; required with cos.
        scale: What scores are multiplied by, in fp32; 1.0 in Dia.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    if cos is not None and sin is not None and positions is not None:
        at = positions.long().clamp(min=0)
        q = _rotate(q.view(q.shape[0], -1, k_pages.shape[3]), cos[at], sin[at]).view(q.shape)
    return _attend_each(q, k_pages, v_pages, block_table, lengths.tolist(), out, scale)


def _attend_each(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: list[int],
    out: Tensor,
    scale: float,
) -> Tensor:
    """Row by row, each over the first `lengths[row]` tokens of its pages. q, out: `[rows, heads * head_dim]`.

    Scores, softmax and weighted sum are float32 and rounded once. What a row computes knows nothing of the other rows:
    shapes and addresses, on which orders of summation may depend, are those of the row alone.
    """
    kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    grouped = (q.shape[0], kv_heads, q.shape[1] // (kv_heads * head_dim), head_dim)
    for query, pages, length, result in zip(q.view(grouped), block_table, lengths, out.view(grouped), strict=True):
        if length == 0:
            result.zero_()
            continue
        wide = torch.empty_like(query, dtype=_wide(q.dtype)).copy_(query)
        scores = torch.bmm(wide, _gather(k_pages, pages, length).transpose(1, 2))
        if scale != 1.0:
            scores *= scale
        result.copy_(torch.bmm(scores.softmax(-1), _gather(v_pages, pages, length)))
    return out


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_heads: int,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> Tensor:
    """Rotate q and k of `qkv` in place, for prefill; with pages given, also store k and v in them.

    Args:
        qkv: `[tokens, (heads + 2 * kv_heads) * head_dim]`, q first.
        cos: `[max_positions, head_dim / 2]` float32.
        sin: As cos.
        positions: `[tokens]` int32.
        kv_heads: Heads of k and of v.
        k_pages: `[pages, kv_heads, page_size, head_dim]`, written; None to store nothing.
        v_pages: As k_pages.
        slot_mapping: `[tokens]` int64, `page * page_size + offset` of each token, -1 to store nothing.

    Returns:
        `qkv`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    head_dim = 2 * cos.shape[1]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    turning = heads[:, : heads.shape[1] - kv_heads]
    turning.copy_(_rotate(turning, cos[positions.long()], sin[positions.long()]))
    if k_pages is not None and v_pages is not None and slot_mapping is not None:
        page_size = k_pages.shape[2]
        keep = slot_mapping >= 0
        page, offset = slot_mapping[keep] // page_size, slot_mapping[keep] % page_size
        k_pages[page, :, offset] = heads[keep, -2 * kv_heads : -kv_heads]
        v_pages[page, :, offset] = heads[keep, -kv_heads:]
    return qkv


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    out: Tensor,
    *,
    causal: bool,
    block_table: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Attend within several sequences of different lengths, packed one after another, for prefill.

    Args:
        q: `[tokens, heads, head_dim]`, any strides with a contiguous last axis.
        k: Packed, without a block table: `[tokens, kv_heads, head_dim]`, cut by `starts` as q is. Paged:
            `[pages, kv_heads, page_size, head_dim]`.
        v: As k.
        starts: `[sequences + 1]` int32, the first query of each sequence, and the number of tokens.
        out: `[tokens, heads * head_dim]`, written.
        causal: The queries are the last ones of their sequence; query `i` of `n` sees keys `0 .. kv_length - n + i`.
        block_table: `[sequences, max_pages]` int32, for paged keys.
        kv_lengths: `[sequences]` int32, tokens in the cache, those of this call included. A sequence without keys gives
            0.
        scale: What scores are multiplied by; 1.0 in Dia.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    bounds = starts.tolist()
    lengths = (
        kv_lengths.tolist() if kv_lengths is not None else [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    )
    for sequence, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        n, m = end - begin, lengths[sequence]
        if n == 0:
            continue
        if m == 0:
            out[begin:end] = 0
            continue
        if block_table is None:
            keys, values = k[begin:end].transpose(0, 1), v[begin:end].transpose(0, 1)
        else:
            keys, values = (_gather(pages, block_table[sequence], m) for pages in (k, v))
        result = _attend(q[begin:end].transpose(0, 1), keys, values, causal, scale)
        out[begin:end] = result.transpose(0, 1).reshape(n, -1)
    return out
