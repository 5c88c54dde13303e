"""From two rows of logits to one code per channel: guidance, filters, EOS rule, draw.

Every sum that decides something is a sum of integers, so its order does not matter and a kernel can match it exactly.
"""

import torch
from torch import Tensor

WEIGHT_ONE = 1 << 30  # fixed-point weight of the likeliest candidate
NOT_FINITE, EMPTY = 1, 2  # in the lowest two bits of a status; the step is above them
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """Return the first word of Philox4x32-10 for 64-bit keys and counters `(c0, c1, 0, 0)`, as int64 in `[0, 2^32)`.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; `triton.language.philox` is the same.

    Args:
        seed: Integers; the low and the high word, its sign bit included, are the key.
        c0: Integers in the shape of seed.
        c1: Integers in the shape of seed.
    """
    seed = seed.to(torch.int64)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = c0.to(torch.int64) & _MASK, c1.to(torch.int64) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = _mul32(_M0, c0)
        hi1, lo1 = _mul32(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0


def _mul32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product, without leaving int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _best(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest entries of the last axis, best first; ties go to the lower id.

    Sorting a few ids out of a thousand by a key that is never equal is faster than a stable sort of all.
    """
    vocab = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers that compare as the floats do
    keys = ordered * vocab + torch.arange(vocab - 1, -1, -1, device=scores.device, dtype=torch.int64)
    return keys.topk(min(count, vocab), dim=-1).indices


def _most_kept(top_k: Tensor, vocab: int) -> int:
    """Return the largest `top_k` of all requests, where 0 means all."""
    return vocab if bool((top_k <= 0).any()) else int(top_k.max())


def _keep_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Mask of the `top_k` largest entries of the last axis; ties go to the lower id; 0 keeps all."""
    best = _best(scores, _most_kept(top_k, scores.shape[-1]))
    within = torch.arange(best.shape[-1], device=scores.device, dtype=torch.int64) < top_k[:, None, None]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, within.expand_as(best))
    return kept | (top_k[:, None, None] <= 0)


def _numbers(scores: Tensor) -> Tensor:
    """NaN and infinity become minus infinity."""
    return torch.where(scores < torch.inf, scores, -torch.inf)


def _candidates(
    logits: Tensor, guidance_scale: Tensor, top_k: Tensor, eos: int, first_generation: bool
) -> tuple[Tensor, Tensor]:
    """Take steps 1 to 4 of `sample_weights`: scores, -inf for ids that are out, and where one was no number.

    `[batch, channels, vocab]` float32 and `[batch, channels]` bool.
    """
    batch = guidance_scale.shape[0]
    channels, vocab = logits.shape[1:]
    wrong = ~(logits[:batch] < torch.inf)
    cond = _numbers(logits[:batch])
    minus_inf = torch.tensor(-torch.inf, device=logits.device, dtype=torch.float32)
    scores = cond.clone()
    guided = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    if logits.shape[0] == 2 * batch:
        guided = guidance_scale != 1
        mixed = cond + guidance_scale[:, None, None] * (cond - logits[batch:])
        wrong |= guided[:, None, None] & ~((logits[batch:] < torch.inf) & (mixed < torch.inf))
        mixed = _numbers(mixed)
        if first_generation:
            scores = torch.where(guided[:, None, None], mixed, scores)
            guided = torch.zeros_like(guided)
        else:
            kept = torch.where(_keep_top_k(mixed, top_k), torch.where(top_k[:, None, None] > 0, cond, mixed), minus_inf)
            scores = torch.where(guided[:, None, None], kept, scores)

    ids = torch.arange(vocab, device=logits.device, dtype=torch.int64)
    limit = torch.full((channels, 1), eos, device=logits.device, dtype=torch.int64)
    limit[0] += 1
    if first_generation:
        scores[:, 0, eos] *= 0.8
    scores = torch.where(ids < limit, scores, minus_inf)
    first = scores[:, 0]
    eos_wins = first.argmax(-1, keepdim=True) == eos
    out = (ids == eos) & ~eos_wins if first_generation else (ids == eos) != eos_wins
    scores[:, 0] = torch.where(out, minus_inf, first)
    if not bool(guided.all()):
        scores = torch.where(guided[:, None, None] | _keep_top_k(scores, top_k), scores, minus_inf)
    return scores, wrong.any(-1)


def sample_weights(
    logits: Tensor,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    *,
    eos: int,
    first_generation: bool = False,
) -> Tensor:
    """Return the distribution that `sample` draws from, as integer weights.

    Steps (docs/dia.md):

    1. guided requests (`rows == 2 * batch` and `guidance_scale != 1`): `guided = cond + scale * (cond - uncond)`; with
       `top_k > 0` the conditional logits of the `top_k` best guided ids stay, without it `guided` itself goes on;
    2. ids above `eos` on channel 0, from `eos` on elsewhere: out;
    3. channel 0: if `eos` is the argmax it stays alone, otherwise it is out;
    4. unguided requests: the `top_k` best stay;
    5. greedy (`temperature == 0`): the argmax gets all the weight. Otherwise weights are
       `floor(exp((score - max) * (1 / temperature)) * 2^30 + 0.5)` and an id stays when the weights of all ids before
       it, best first, sum to at most `top_p` of the total.

    Ties are broken by the lower id throughout. NaN and infinity count as minus infinity, among the logits and among
    the guided ones. If no candidate is left, id 0 gets the weight (argmax of nothing).

    Args:
        logits: As in `sample`, as are all arguments up to eos.
        guidance_scale: `[batch]` float32.
        temperature: `[batch]` float32.
        top_k: `[batch]` int32.
        top_p: `[batch]` float32.
        eos: Id of the end of sequence.
        first_generation: The rules of the first Dia-1.6B. In step 1 `guided` itself goes on, whatever `top_k` is;
            before
            step 2 the logit of `eos` on channel 0 is multiplied by 0.8; in step 3 an `eos` that is the argmax does not
            stay alone; step 4 is for all requests.

    Returns:
        `[batch, channels, vocab]` int64. An id's probability is its weight divided by the sum over `vocab`.
    """
    return _weights(_candidates(logits, guidance_scale, top_k, eos, first_generation)[0], temperature, top_k, top_p)


def _weights(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Step 5 of `sample_weights`."""
    vocab = scores.shape[-1]
    ids = torch.arange(vocab, device=scores.device, dtype=torch.int64)
    best = scores.argmax(-1, keepdim=True)
    greedy = (temperature == 0)[:, None, None]
    heat = torch.where(greedy, 1.0, temperature[:, None, None]).reciprocal().clamp(max=torch.finfo(torch.float32).max)
    gap = scores - scores.gather(-1, best)
    weights = (torch.exp(gap * heat) * WEIGHT_ONE + 0.5).floor().nan_to_num(nan=0.0).to(torch.int64)
    weights = torch.where((ids == best), WEIGHT_ONE, weights * ~greedy)

    order = _best(scores, _most_kept(top_k, vocab))  # no more ids than that are left
    ranked = weights.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    budget = (top_p[:, None, None] * ranked.sum(-1, keepdim=True).float()).to(torch.int64)
    stays = (before <= budget) | (top_p >= 1)[:, None, None]
    return weights * torch.zeros_like(weights).scatter_(-1, order, stays.to(torch.int64))


def sample(
    logits: Tensor,
    step: Tensor,
    seed: Tensor,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    out: Tensor,
    status: Tensor,
    *,
    eos: int,
    first_generation: bool = False,
) -> Tensor:
    """Draw one code per request and channel.

    The draw is `floor(u * total)` on the cumulative integer weights in id order, `u` the 32-bit Philox word of
    (seed, step, channel): the same seed gives the same code whatever else is in the batch. Whatever the bits of the
    logits are, a code is from 0 to `vocab - 1`.

    Args:
        logits: `[rows, channels, vocab]` float32; rows is batch (no guidance) or 2 * batch: conditional rows first.
        step: `[batch]` int32, the step being sampled, also in the random key; a request with `step < 0` is inert.
        seed: `[batch]` int64.
        guidance_scale: `[batch]` float32, 1 for none.
        temperature: `[batch]` float32, 0 for greedy.
        top_k: `[batch]` int32, 0 for all.
        top_p: `[batch]` float32 in (0, 1].
        out: `[batch, channels]` int32, written.
        status: `[batch, channels]` int32, where 0 means that all has been well; then it becomes `4 * step + kind` once
            something is not, and stays that. The kinds are `NOT_FINITE`: a logit of the request, or what guidance makes
            of it, is NaN or infinity, and `EMPTY`: not that, no candidate is left, and the draw is not greedy (a greedy
            one takes id 0, as transformers does, which raises in the other case). Minus infinity is no fault by itself:
            such an id is out.
        eos: Id of the end of sequence; ids above it are special.
        first_generation: As in `sample_weights`.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    scores, wrong = _candidates(logits, guidance_scale, top_k, eos, first_generation)
    weights = _weights(scores, temperature, top_k, top_p)
    batch, channels, _ = weights.shape
    channel = torch.arange(channels, device=logits.device, dtype=torch.int64).expand(batch, channels)
    bits = philox(seed[:, None].expand(batch, channels), step[:, None].expand(batch, channels), channel)
    edges = weights.cumsum(-1)
    total = edges[..., -1]
    target = bits * (total >> 32) + _high32(bits, total & _MASK)
    drawn = (edges <= target[..., None]).sum(-1).to(torch.int32)
    empty = (scores == -torch.inf).all(-1) & (temperature != 0)[:, None]
    kind = torch.where(wrong, NOT_FINITE, torch.where(empty, EMPTY, 0))
    first = (kind != 0) & (status == 0) & (step >= 0)[:, None]
    status.copy_(torch.where(first, step[:, None] * 4 + kind, status))
    return out.copy_(torch.where((step >= 0)[:, None], drawn, out))


def _high32(a: Tensor, b: Tensor) -> Tensor:
    """Return `(a * b) >> 32` for unsigned 32-bit values held in int64, without overflow."""
    low = (a & 0xFFFF) * b
    return ((a >> 16) * b + (low >> 16)) >> 16
