"""sample: from two rows of logits to one code per channel, in one launch.

    guided = cond + scale * (cond - uncond);  candidates = conditional logits of the top_k best guided ids
    (first generation: the guided logits themselves, EOS x 0.8, out unless it is the argmax, then the top_k best)
    EOS rule on channel 0;  weights = floor(exp((score - max) * (1 / temperature)) * 2^30 + 0.5)
    top_p;  one Philox draw;  a status where scores are not numbers or no candidate is left

One program per (request, channel); a row of logits is read once and stays in registers. The top_k and top_p borders are
found by bisection over the bits of the float's ordered integer image: exact, no sort. Weights are integers, so sums do
not depend on their order: the result equals the torch reference wherever `exp` gives the same weights.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch
from dia_kernels.reference.sampling import EMPTY as _EMPTY
from dia_kernels.reference.sampling import NOT_FINITE as _NOT_FINITE

WEIGHT_ONE = tl.constexpr(1 << 30)
NOT_FINITE, EMPTY = tl.constexpr(_NOT_FINITE), tl.constexpr(_EMPTY)


@triton.jit
def _ordered(x):
    """uint32 that orders as the float does: flip all bits of negatives, the sign bit of the others; -0.0 is 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _keep_top_k(key, real, top_k, DIGIT: tl.constexpr):
    """Mask of the top_k largest keys, ties to the lower id. Real keys are never 0 (that would be a NaN's image)."""
    digits = tl.arange(0, 1 << DIGIT).to(tl.uint32)[:, None]
    border = tl.zeros([], tl.uint32)
    for step in range(32 // DIGIT):  # a loop in the machine code too: unrolled, it would not fit an instruction cache
        shift = 32 - DIGIT * (step + 1)
        trials = border | (digits << shift.to(tl.uint32))  # [2^DIGIT, 1], ascending: the counts fall
        counts = tl.sum((real[None, :] & (key[None, :] >= trials)).to(tl.int32), 1)
        border |= (tl.sum((counts >= top_k).to(tl.int32), 0) - 1).to(tl.uint32) << shift.to(tl.uint32)
    above = real & (key > border)
    level = real & (key == border)
    room = top_k - tl.sum(above.to(tl.int32), 0)
    return above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))


@triton.jit
def _keep_top_p(key, weight, budget, DIGIT: tl.constexpr):
    """Mask of the ids whose predecessors' weights, best first, sum to at most budget."""
    digits = tl.arange(0, 1 << DIGIT).to(tl.uint32)[:, None]
    border = tl.zeros([], tl.uint32)
    for step in range(32 // DIGIT):  # a loop in the machine code too: unrolled, it would not fit an instruction cache
        shift = 32 - DIGIT * (step + 1)
        trials = border | (digits << shift.to(tl.uint32))
        better = tl.sum(tl.where(key[None, :] > trials, weight[None, :], 0), 1)
        border |= tl.maximum(tl.sum((better > budget).to(tl.int32), 0) - 1, 0).to(tl.uint32) << shift.to(tl.uint32)
    # border is the largest key whose betters exceed the budget: the next key is the last one that can stay.
    last = border + 1
    level = tl.where(key == last, weight, 0)
    before = tl.sum(tl.where(key > last, weight, 0), 0) + tl.cumsum(level, 0) - level
    return (key > last) | ((key == last) & (before <= budget))


@triton.jit
def _numbers(x):
    """NaN and infinity become minus infinity: no later maximum, comparison or conversion meets a NaN."""
    return tl.where(x < float("inf"), x, float("-inf"))


@triton.jit
def _eos_rule(score, ids, channel, EOS: tl.constexpr, FIRST: tl.constexpr):
    """Channel 0: EOS alone if it is the argmax, otherwise not at all. Other channels: unchanged.

    In the first generation the others stay beside an EOS that is the argmax.
    """
    wins = tl.argmax(score, 0, tie_break_left=True) == EOS
    if FIRST:
        return tl.where((ids == EOS) & ~wins, float("-inf"), score)
    else:
        return tl.where((channel == 0) & ((ids == EOS) != wins), float("-inf"), score)


@triton.jit
def _sample(
    logits_ptr,  # [rows, CHANNELS, VOCAB] float32
    step_ptr,  # [batch] int32
    seed_ptr,  # [batch] int64
    scale_ptr,  # [batch] float32
    temperature_ptr,  # [batch] float32
    top_k_ptr,  # [batch] int32
    top_p_ptr,  # [batch] float32
    out_ptr,  # [batch, CHANNELS] int32
    status_ptr,  # [batch, CHANNELS] int32, set once
    batch,
    CHANNELS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EOS: tl.constexpr,
    PAIRED: tl.constexpr,
    FIRST: tl.constexpr,  # the rules of the first generation
    DIGIT: tl.constexpr,
):
    batch_idx = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    step = tl.load(step_ptr + batch_idx)
    if step < 0:
        return
    ids = tl.arange(0, BLOCK_V)
    real = ids < VOCAB
    allowed = ids < tl.where(channel == 0, EOS + 1, EOS)
    top_k = tl.minimum(tl.load(top_k_ptr + batch_idx), VOCAB)
    scale = tl.load(scale_ptr + batch_idx)
    cond = tl.load(logits_ptr + (batch_idx * CHANNELS + channel) * VOCAB + ids, mask=real, other=float("-inf"))

    wrong = real & ~(cond < float("inf"))
    cond = _numbers(cond)
    guided = False
    if PAIRED:
        guided = scale != 1.0
    if not FIRST:
        ranked = _eos_rule(tl.where(allowed, cond, float("-inf")), ids, channel, EOS, FIRST)
    if guided:
        other = tl.load(logits_ptr + ((batch + batch_idx) * CHANNELS + channel) * VOCAB + ids, mask=real, other=0.0)
        mixed = cond + scale * (cond - other)
        wrong = wrong | (real & ~((other < float("inf")) & (mixed < float("inf"))))
        if FIRST:
            cond = _numbers(mixed)
        else:
            ranked = tl.where(real, _numbers(mixed), float("-inf"))
    if FIRST:
        cond = tl.where((channel == 0) & (ids == EOS), cond * 0.8, cond)
        ranked = _eos_rule(tl.where(allowed, cond, float("-inf")), ids, channel, EOS, FIRST)
    kept = real
    if top_k > 0:
        kept = _keep_top_k(_ordered(ranked), real, top_k, DIGIT)
    score = tl.where(kept, ranked, float("-inf"))
    if not FIRST and guided:
        # Special ids took part in the ranking and only now leave, as in both reference implementations.
        score = tl.where(kept & allowed, tl.where(top_k > 0, cond, ranked), float("-inf"))
        score = _eos_rule(score, ids, channel, EOS, FIRST)

    best = tl.argmax(score, 0, tie_break_left=True)
    temperature = tl.load(temperature_ptr + batch_idx)
    drawn = best
    peak = tl.max(score, 0)
    kind = tl.where((temperature != 0.0) & (peak == float("-inf")), EMPTY, 0)
    kind = tl.where(tl.sum(wrong.to(tl.int32), 0) > 0, NOT_FINITE, kind)
    # Stored before the draw, whose 64-bit weights need the registers.
    place = status_ptr + batch_idx * CHANNELS + channel
    tl.store(place, step * 4 + kind, mask=tl.load(place, mask=kind != 0, other=1) == 0)
    if temperature != 0.0:
        top_p = tl.load(top_p_ptr + batch_idx)
        gap = tl.where(score == float("-inf"), float("-inf"), score - peak)
        heat = tl.minimum(tl.div_rn(1.0, temperature), 3.4028234663852886e38)  # 0 times infinity would be NaN
        weight = tl.floor(tl.exp(gap * heat) * WEIGHT_ONE + 0.5).to(tl.int64)
        weight = tl.where(ids == best, WEIGHT_ONE, weight)
        if top_p < 1.0:
            budget = (top_p * tl.sum(weight, 0).to(tl.float32)).to(tl.int64)
            weight = tl.where(_keep_top_p(_ordered(score), weight, budget, DIGIT), weight, 0)
        edges = tl.cumsum(weight, 0)
        total = tl.sum(weight, 0)
        c0 = step.to(tl.uint32)
        zero = c0 * 0
        bits, _1, _2, _3 = tl.philox(tl.load(seed_ptr + batch_idx), c0, channel.to(tl.uint32), zero, zero)
        wide = bits.to(tl.int64)
        low = total & 0xFFFFFFFF
        target = wide * (total >> 32) + (((wide >> 16) * low + (((wide & 0xFFFF) * low) >> 16)) >> 16)
        drawn = tl.sum((real & (edges <= target)).to(tl.int32), 0)
    tl.store(out_ptr + batch_idx * CHANNELS + channel, drawn)


def _default_config(dtype: torch.dtype, arch: str, *, vocab: int) -> dict[str, int]:
    # The compiler for sm_100 stops at 128 registers from 8 rows on, and spills.
    return {"DIGIT": 2, "num_warps": 8 if arch.startswith("sm_10") else 4}


def sample(
    logits: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    guidance_scale: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
    *,
    eos: int,
    first_generation: bool = False,
) -> torch.Tensor:
    """As `dia_kernels.reference.sample`; all tensors contiguous, vocab at most 16384."""
    rows, channels, vocab = logits.shape
    batch = out.shape[0]
    if rows not in (batch, 2 * batch):
        raise ValueError(f"logits: has {rows} rows, needs {batch} or {2 * batch} for {batch} requests")
    if logits.dtype != torch.float32:
        raise TypeError(f"logits: float32 needed, got {logits.dtype}")
    if vocab > 16384:
        raise ValueError(f"logits: vocab {vocab} is above 16384, the largest row one program keeps in registers")
    params = {
        "step": step, "seed": seed, "guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k,
        "top_p": top_p,
    }  # fmt: skip
    per_code = {"out": (out, (batch, channels)), "status": (status, (batch, channels))}
    per_request = {name: (tensor, (batch,)) for name, tensor in params.items()}
    launch.require({"logits": (logits, logits.shape), **per_code, **per_request})
    config = launch.configuration("sample", _default_config, logits.dtype, logits.device, vocab=vocab)
    if config["DIGIT"] not in (1, 2, 4, 8):
        raise ValueError(f"DIGIT: {config['DIGIT']} bits a round, needs 1, 2, 4 or 8, which divide 32")
    launch.run(
        _sample,
        (batch, channels),
        logits,
        step,
        seed,
        guidance_scale,
        temperature,
        top_k,
        top_p,
        out,
        status,
        batch,
        CHANNELS=channels,
        VOCAB=vocab,
        BLOCK_V=triton.next_power_of_2(vocab),
        EOS=eos,
        PAIRED=rows == 2 * batch,
        FIRST=first_generation,
        **config,
        # A fused multiply-add would move guided scores by an ulp against the reference and with them the top_k border.
        enable_fp_fusion=False,
    )
    return out
