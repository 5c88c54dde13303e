"""Attention of one new token per row over a paged K/V cache, split over programs: what both decode attentions share.

    out[row, head] = sum_t softmax_t(SCALE * q . k[t]) v[t],  t = 0 .. length - 1

The tokens of a row are cut into splits of a fixed number of tokens, one program each, and every program serves all
query heads of one kv head, so K and V are read once. A row of one split is written by its program. Otherwise each split
leaves its sum, maximum and weight in the workspace and counts itself in; whoever comes last merges the splits in their
order and sets the counter back. The split size does not depend on the rows, nor does anything else in a program: a
row's result is the same to the bit whatever its neighbours are.

Programs beyond the end of their row return at once: registers that they held would be missing for the weights of the
launches behind. The first program of each row waits for the launch in front even where the row is empty. A launch of
which no program waited could end before the one in front of it, and `kv_ready` relies on launches ending in order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


class AttentionWorkspace(NamedTuple):
    """Scratch memory of the split attention; any number of launches may use it one after another."""

    partials: torch.Tensor  # float32, a weighted sum of V per (row, head, split)
    stats: torch.Tensor  # float32, the largest score and the sum of weights per (row, head, split)
    arrivals: torch.Tensor  # int32, finished splits per (row, kv head); 0 between launches


def attention_workspace(
    rows: int, heads: int, head_dim: int, max_length: int, device: torch.device | str
) -> AttentionWorkspace:
    """Scratch for both decode attentions of up to `rows` rows, `heads` query heads and `max_length` tokens."""
    splits = triton.cdiv(max_length, smallest_split(head_dim))
    return AttentionWorkspace(
        torch.empty(rows * heads * splits * head_dim, dtype=torch.float32, device=device),
        torch.empty(rows * heads * splits * 2, dtype=torch.float32, device=device),
        torch.zeros(rows * heads, dtype=torch.int32, device=device),
    )


def packed_workspace(rows: int, heads: int, head_dim: int, max_length: int, device: torch.device | str) -> torch.Tensor:
    """As `attention_workspace`, in one tensor: `[lines, 1 + splits * (head_dim + 2)]` float32, zeros.

    The counters are its first `lines` values, wherever the rest is cut: a call of another size finds none changed.
    """
    splits = triton.cdiv(max_length, smallest_split(head_dim))
    lines = triton.cdiv(rows * heads, 4) * 4  # what follows the counters then begins at a multiple of 16 bytes
    return torch.zeros(lines, 1 + splits * (head_dim + 2), dtype=torch.float32, device=device)


def unpacked_workspace(packed: torch.Tensor, head_dim: int) -> AttentionWorkspace:
    """The parts of what `packed_workspace` returned. Raises ValueError."""
    if packed.ndim != 2 or packed.shape[1] < 1 or packed.dtype != torch.float32 or not packed.is_contiguous():
        found = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"workspace: {found}, needs what attention_workspace returns")
    lines, width = packed.shape
    sums = lines * ((width - 1) // (head_dim + 2)) * head_dim
    flat = packed.view(-1)
    return AttentionWorkspace(flat[lines : lines + sums], flat[lines + sums :], flat[:lines].view(torch.int32))


def smallest_split(head_dim: int) -> int:
    """Tokens; a workspace has room for splits of this size."""
    return min(64, 8192 // triton.next_power_of_2(head_dim))


def _default_config(dtype: torch.dtype, arch: str, *, split: int, group: int, head_dim: int) -> dict[str, int]:
    """Tokens per split, splits merged at once, and warps.

    K and V of a split are loaded at once, straight into registers, 32 to 128 of each thread's: that is the traffic in
    flight. Pure; the number of rows must not enter, or a row's result would depend on it.
    """
    width = triton.next_power_of_2(head_dim)
    token_bytes = 2 * width * dtype.itemsize
    most = 131072 if arch == "sm_90" and dtype.itemsize == 2 else 65536  # bytes of K and V
    split = max(min(split, most // token_bytes), smallest_split(head_dim))
    warps = min(8, max(4, split * token_bytes // (32 * 256)))
    if arch.startswith("gfx"):  # the operands of matrix products take several times their size in registers there
        split = min(split, 64)
        # On RDNA that makes four for a 16-bit split: see `attend`.
        warps = min(8, max(4, split * token_bytes // (32 * 256)))
    if (arch == "sm_90" or arch.startswith("gfx9")) and dtype.itemsize == 2:
        warps = 8 if group > 1 or split * token_bytes > 65536 else 4  # measured on an H200: more for shared K and V
    if arch.startswith("sm_1") and dtype.itemsize == 4 and warps == 8:
        warps = 16  # from sm_100 on the compiler finds too few registers for half as many
    chunk = max(1, warps * 1024 // (triton.next_power_of_2(group) * width))  # so many sums fit into registers
    return {"SPLIT": split, "CHUNK": min(chunk, 8), "num_warps": warps}


def check_pages(
    k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, out: torch.Tensor
) -> tuple[int, int, int]:
    """`(rows, heads, kv_heads)`; raises ValueError naming the argument if the kernels cannot read such a cache."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        shapes = f"{tuple(k_pages.shape)}, {tuple(v_pages.shape)}"
        raise ValueError(f"k_pages, v_pages: {shapes}, need the same [pages, kv_heads, page_size, head_dim]")
    _, kv_heads, page_size, head_dim = k_pages.shape
    if page_size not in (16, 32, 64):
        raise ValueError(f"k_pages: page size {page_size}, needs 16, 32 or 64 tokens")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"k_pages: head_dim {head_dim}, needs a multiple of 16 from 16 to 256")
    rows, width = out.shape
    if width == 0 or width % (kv_heads * head_dim):
        raise ValueError(f"out: {width} columns, needs a multiple of {kv_heads} kv heads x {head_dim}")
    if {k_pages.dtype, v_pages.dtype} != {out.dtype} or out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        dtypes = f"{out.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        raise ValueError(f"out, k_pages, v_pages: {dtypes}, need one of float32, float16, bfloat16")
    if block_table.ndim != 2 or block_table.shape[0] != rows or block_table.dtype != torch.int32:
        found = f"{block_table.dtype} {tuple(block_table.shape)}"
        raise ValueError(f"block_table: {found}, needs int32 [{rows}, max_pages]")
    launch.require_contiguous(k_pages=k_pages, v_pages=v_pages, block_table=block_table, out=out)
    return rows, width // head_dim, kv_heads


def run(
    op: str,
    kernel: Any,
    split: int,
    inputs: tuple[torch.Tensor | None, ...],
    cache: tuple[torch.Tensor, ...],
    workspace: object,
    kv_ready: bool,
    scale: float,
) -> None:
    """Launch a decode attention: one program per row, kv head and split of the longest row the block table can hold.

    inputs: the kernel's own tensors; cache: k_pages, v_pages, block_table, lengths or positions, out. kv_ready: whether
    the cache may be read while launches before this one still run. scale: of the scores.
    """
    k_pages, _, block_table, _, out = cache
    _, kv_heads, page_size, head_dim = k_pages.shape
    rows, heads, max_pages = out.shape[0], out.shape[1] // head_dim, block_table.shape[1]
    group = heads // kv_heads
    chosen = launch.configuration(
        op, _default_config, out.dtype, out.device, split=split, group=group, head_dim=head_dim
    )
    if chosen["SPLIT"] % page_size:
        raise ValueError(
            f"k_pages: pages of {page_size} tokens do not fill splits of {chosen['SPLIT']}, the size for head_dim "
            f"{head_dim} in {out.dtype}; use smaller pages"
        )
    splits = triton.cdiv(max_pages * page_size, chosen["SPLIT"])
    if not isinstance(workspace, AttentionWorkspace):
        raise TypeError(f"workspace: {type(workspace).__name__}, needs what attention_workspace returns")
    lines = rows * heads * splits
    short = workspace.stats.numel() < lines * 2 or workspace.partials.numel() < lines * head_dim
    if short or workspace.arrivals.numel() < rows * kv_heads:
        needed = f"{rows}, {heads}, {head_dim}, {max_pages * page_size}"
        raise ValueError(f"workspace: too small for this call; make it with attention_workspace({needed}, ...)")
    if rows * splits == 0:
        return
    launch.run(
        kernel,
        (rows * kv_heads, splits),
        *inputs,
        *cache,
        *workspace,
        max_pages,
        GROUP=group,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_G=max(16 if out.dtype.itemsize == 2 else 1, triton.next_power_of_2(group)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        SCALE=float(scale),
        enable_fp_fusion=True,
        **chosen,
        **options(launch.architecture(out.device), kv_ready),
    )


def options(arch: str, kv_ready: bool) -> dict[str, Any]:
    """Arguments that depend on the target: family, programmatic dependent launch, size of the matrix instruction."""
    if arch.startswith("sm_") and int(arch[3:]) >= 90:
        return {"TARGET": "cuda", "USE_PDL": True, "KV_READY": kv_ready, "launch_pdl": True}
    families = {"sm_": "cuda", "gfx9": "gfx9", "gfx": "gfx"}
    family = next((name for prefix, name in families.items() if arch.startswith(prefix)), "interpreter")
    matrix = {"matrix_instr_nonkdim": 16} if family == "gfx9" else {}
    return {"TARGET": family, "USE_PDL": False, "KV_READY": False, **matrix}


@triton.jit
def head_axis(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Element of the head per lane, the one that RoPE pairs it with, its angle, and whether the lane is in use.

    Each half of the head fills half of the lanes, so both indices stay contiguous for any head_dim.
    """
    lane = tl.arange(0, BLOCK_D)
    half = lane // (BLOCK_D // 2)
    angle = lane % (BLOCK_D // 2)
    return half * (HEAD_DIM // 2) + angle, (1 - half) * (HEAD_DIM // 2) + angle, angle, angle < HEAD_DIM // 2


@triton.jit
def rotated(x, partner, cos, sin, d, HEAD_DIM: tl.constexpr):
    """RoPE in fp32, rounded once to the dtype of x; partner: the element that each one is paired with."""
    turn = tl.where(d < HEAD_DIM // 2, -sin, sin)
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * turn).to(x.dtype)


@triton.jit
def load_tile(
    k_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM]
    v_ptr,  # [pages, KV_HEADS, PAGE, HEAD_DIM]
    page,  # [SPLIT] int32, page of each token, anything where not live
    live,  # [SPLIT]
    kv_head,
    d,  # [BLOCK_D]
    used,  # [BLOCK_D]
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """K and V of a split's tokens, `[SPLIT, BLOCK_D]`, 0 where not live."""
    inside = tl.arange(0, SPLIT) % PAGE  # splits begin with a page
    at = ((page.to(tl.int64) * KV_HEADS + kv_head) * PAGE + inside)[:, None] * HEAD_DIM + d[None, :]
    mask = live[:, None] & used[None, :]
    k = tl.load(k_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    v = tl.load(v_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    return k, v


@triton.jit
def keep_both_in_flight(k, v, TARGET: tl.constexpr):
    """Return k and v unchanged.

    The compiler moves K into shared memory, and so waits for it, right behind its load: before V is requested. Neither
    can pass an assembly statement that takes both, even one without instructions.
    """
    PACK: tl.constexpr = 32 // k.dtype.primitive_bitwidth
    if TARGET == "cuda":
        k, v = tl.inline_asm_elementwise("", "=r,=r,0,1", [k, v], dtype=(k.dtype, v.dtype), is_pure=False, pack=PACK)
    elif TARGET != "interpreter":
        k, v = tl.inline_asm_elementwise("", "=v,=v,0,1", [k, v], dtype=(k.dtype, v.dtype), is_pure=False, pack=PACK)
    return k, v


@triton.jit
def settle(x, TARGET: tl.constexpr):
    """Return x unchanged, computed where it is.

    On AMD, left to itself, the compiler moves the arithmetic behind a matrix operand into the operand's layout, where
    every warp holds all of it: RoPE of q then takes hundreds of registers. It cannot move an assembly statement.
    """
    if TARGET == "gfx" or TARGET == "gfx9":
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("", "=v,0", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    else:
        return x


@triton.jit
def scaled(score, SCALE: tl.constexpr):
    """`SCALE * score`; nothing is computed for 1.0."""
    if SCALE != 1.0:
        score *= SCALE
    return score


@triton.jit
def scores(q, k, DOT: tl.constexpr):
    """`q @ k.T` in fp32: q `[M, D]`, k `[N, D]`; by matrix units, or row by row where there are none."""
    if DOT:
        return tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        m = tl.arange(0, q.shape[0])[:, None]
        score = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
        for i in tl.static_range(q.shape[0]):
            one = tl.sum(tl.where(m == i, q, 0.0), 0)
            score = tl.where(m == i, tl.sum(one[None, :] * k, 1)[None, :], score)
        return score


@triton.jit
def mix(weight, v, DOT: tl.constexpr):
    """`weight @ v` in fp32: weight `[M, N]` float32, rounded to the dtype of v; v `[N, D]`."""
    if DOT:
        return tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    else:
        m = tl.arange(0, weight.shape[0])[:, None]
        mixed = tl.zeros([weight.shape[0], v.shape[1]], tl.float32)
        for i in tl.static_range(weight.shape[0]):
            one = tl.sum(tl.where(m == i, weight, 0.0), 0)
            mixed = tl.where(m == i, tl.sum(one[:, None] * v, 0)[None, :], mixed)
        return mixed


@triton.jit
def attend(
    q,  # [BLOCK_G, BLOCK_D]
    k,  # [SPLIT, BLOCK_D]
    v,  # [SPLIT, BLOCK_D]
    live,  # [SPLIT]
    least,  # [BLOCK_G] float32, a score that the row has elsewhere, or -inf if a token is live
    SCALE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Largest score `[BLOCK_G]`, sum of exp(score - largest) and that sum over v `[BLOCK_G, BLOCK_D]`, all float32.

    16-bit products go to the matrix units, the group padded to their 16 rows: next to the memory traffic that is free.
    In float32 most targets would pay the padding's full price. RDNA multiplies by V from the other side: Triton gives
    all warps of a product behind a product to its rows, here the 16 of the group, so each would hold all of V.
    """
    DOT: tl.constexpr = k.dtype.primitive_bitwidth == 16
    score = tl.where(live[None, :], scaled(scores(q, k, DOT), SCALE), float("-inf"))
    peak = tl.maximum(least, tl.max(score, 1))
    weight = tl.exp(score - peak[:, None])
    if DOT and TARGET == "gfx":
        mixed = tl.trans(tl.dot(tl.trans(v), tl.trans(weight.to(v.dtype)), input_precision="ieee"))
    else:
        mixed = mix(weight, v, DOT)
    return peak, tl.sum(weight, 1), mixed


@triton.jit
def finish(
    peak,  # [BLOCK_G] float32
    total,  # [BLOCK_G] float32
    acc,  # [BLOCK_G, BLOCK_D] float32
    split,
    splits,  # of this row
    row_head,  # row * KV_HEADS + kv head
    d,  # [BLOCK_D]
    used,  # [BLOCK_D]
    out_ptr,  # [rows * KV_HEADS, GROUP, HEAD_DIM]
    partials_ptr,  # [rows * KV_HEADS, grid splits, GROUP, HEAD_DIM] float32
    stats_ptr,  # [rows * KV_HEADS, grid splits, GROUP, 2] float32
    arrivals_ptr,  # [rows * KV_HEADS] int32
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHUNK: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Write the row's result if this program is its only split, or the last of them to get here."""
    g = tl.arange(0, BLOCK_G)
    mask = (g < GROUP)[:, None] & used[None, :]
    if splits == 1:
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row_head * GROUP + g[:, None]) * HEAD_DIM + d[None, :], out, mask=mask)
    else:
        first = row_head * tl.num_programs(1) * GROUP
        line = first + split * GROUP + g
        tl.store(partials_ptr + line[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.store(stats_ptr + line * 2, peak, mask=g < GROUP)
        tl.store(stats_ptr + line * 2 + 1, total, mask=g < GROUP)
        # All warps' stores come before the one thread's release, and its acquire before all warps' loads. On gfx9 the
        # barrier lets a wave's stores be under way still, so each wave waits for its own.
        if TARGET == "gfx9":
            splits = tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v,0", [splits], tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + row_head, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            merge(
                first, splits, row_head, d, used, out_ptr, partials_ptr, stats_ptr, GROUP, HEAD_DIM, d.shape[0], CHUNK
            )
            tl.store(arrivals_ptr + row_head, 0)


@triton.jit
def merge(
    first,  # line of this row's split 0
    splits,
    row_head,
    d,  # [BLOCK_D]
    used,  # [BLOCK_D]
    out_ptr,
    partials_ptr,
    stats_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merge the splits of a row and kv head in order, CHUNK at a time. Loads skip the L1 cache, which may be stale.

    Every lane reads the scores it needs by itself: nothing is exchanged, so nothing waits for a barrier.
    """
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUP)
    g = tl.arange(0, BLOCK_G)
    mask = (g < GROUP)[:, None] & used[None, :]
    # Lanes beyond the group get score 0 and weight 0, so that nothing becomes NaN.
    none = tl.where(g < GROUP, float("-inf"), 0.0)
    peak = none
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, splits, CHUNK):
        peaks, totals, sums = (), (), ()
        higher = peak
        for ahead in tl.static_range(CHUNK):
            line = first + (start + ahead) * GROUP + g
            real = (g < GROUP) & (start + ahead < splits)
            score = tl.load(stats_ptr + line * 2, mask=real, other=none, cache_modifier=".cg")
            peaks = peaks + (score,)  # type: ignore[assignment]
            totals = totals + (tl.load(stats_ptr + line * 2 + 1, mask=real, other=0.0, cache_modifier=".cg"),)  # type: ignore
            at = partials_ptr + line[:, None] * HEAD_DIM + d[None, :]
            sums = sums + (tl.load(at, mask=real[:, None] & mask, other=0.0, cache_modifier=".cg"),)  # type: ignore
            higher = tl.maximum(higher, score)
        shrink = tl.exp(peak - higher)
        total *= shrink
        acc *= shrink[:, None]
        for ahead in tl.static_range(CHUNK):
            weight = tl.exp(peaks[ahead] - higher)
            total += totals[ahead] * weight
            acc += sums[ahead] * weight[:, None]
        peak = higher
    out = (acc / tl.where(g < GROUP, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row_head * GROUP + g[:, None]) * HEAD_DIM + d[None, :], out, mask=mask)
