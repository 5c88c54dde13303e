"""Programs beside those of a launch that leaves the memory idle: they bring weights of a later launch to the L2 cache.

The decode attentions of few rows wait for little data, and the gate and up projection behind them for a lot. Some
columns of programs are added to their grids that issue one bulk prefetch per thread and end. From Hopper on only.
"""

import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launch

PIECES = tl.constexpr(256)  # of the weights that one program brings
MOST_ROWS = 8  # with more, keys and values keep the memory busy by themselves


def half_of(upcoming: Tensor, out: Tensor, arch: str) -> int:
    """Bytes of half of the weights. Raises ValueError if they cannot be brought."""
    if arch.startswith("gfx") or (arch.startswith("sm_") and int(arch[3:]) < 90):
        raise ValueError(f"BRING: {arch} has no bulk prefetch; leave it 0 but for sm_90 and up")
    launch.require_contiguous(upcoming=upcoming)
    if upcoming.device != out.device:
        raise ValueError(f"upcoming: is on {upcoming.device}, out on {out.device}")
    size, address = upcoming.numel() * upcoming.itemsize, 0 if upcoming.is_meta else upcoming.data_ptr()
    if size % 32 or address % 16:
        raise ValueError(f"upcoming: {size} bytes at address {address}, needs two halves that begin at multiples of 16")
    return size // 2


def shares(wanted: int, size: int, half: int, splits: int) -> dict[str, int]:
    """How `wanted` bytes from the given half, of `size` bytes, are shared out among programs of PIECES pieces each.

    The size is a multiple of 16: addresses have to be.
    """
    total = min(wanted, size) // 16 * 16
    if total == 0:
        return {"EXTRA": 0, "PIECE": 0, "FROM": 0, "TO": 0}
    extra = triton.cdiv(total, splits * (256 << 10))
    piece = triton.cdiv(total, extra * splits * PIECES.value * 16) * 16
    return {"EXTRA": extra, "PIECE": piece, "FROM": half * size, "TO": half * size + total}


@triton.jit
def bring(upcoming_ptr, EXTRA: tl.constexpr, PIECE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """Whether this is one of the EXTRA columns of programs, which only bring bytes FROM to TO to the L2 cache.

    Nothing waits for them, and nothing depends on them but time.
    """
    extra = tl.program_id(0) - (tl.num_programs(0) - EXTRA)
    if extra >= 0:
        worker = extra * tl.num_programs(1) + tl.program_id(1)
        at = FROM + (worker * PIECES + tl.arange(0, PIECES)) * PIECE
        address = upcoming_ptr.to(tl.int64) + tl.minimum(at, TO - PIECE)
        size = tl.full([PIECES], PIECE, tl.int32)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [address, size],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return extra >= 0
