"""Ops of training beside matrix products and attention: forward where it differs, and backward.

As everywhere in the reference, ops write into buffers of the caller. Arithmetic is fp32, or fp64 for fp64 inputs, so
that these formulas can themselves be checked by finite differences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

name = "torch"


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Normalise: `out = x / sqrt(mean(x^2) + eps) * weight`, rounded once.

    x, out: `[rows, hidden]`; weight: `[hidden]`.
    """
    wide = _wide(x)
    return out.copy_(wide * _inverse_rms(wide, eps) * weight)


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, grad: Tensor, dx: Tensor, dweight: Tensor | None = None
) -> Tensor:
    """With `n = x / rms(x)` and `g = grad * weight`: `dx = (g - n * mean(g * n)) / rms(x)`, `dweight = sum(grad * n)`.

    x, grad, dx: `[rows, hidden]`; weight, dweight: `[hidden]`, the latter summed over the rows, or None if not wanted.
    """
    wide, upstream = _wide(x), _wide(grad)
    inverse = _inverse_rms(wide, eps)
    normed = wide * inverse
    if dweight is not None:
        dweight.copy_((upstream * normed).sum(0))
    upstream = upstream * weight
    return dx.copy_((upstream - normed * (upstream * normed).mean(-1, keepdim=True)) * inverse)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int, out: Tensor, *, inverse: bool = False
) -> Tensor:
    """Rotate q and k, leave v: `first, second = first * cos - second * sin, second * cos + first * sin`.

    qkv, out: `[tokens, (heads + 2 * kv_heads) * head_dim]`, not the same memory; cos, sin: `[positions, head_dim / 2]`;
    positions: `[tokens]` int32. A rotation's gradient is rotated back: `inverse`. Source: Su et al. 2021, "RoFormer".
    """
    half = cos.shape[1]
    heads = _wide(qkv).view(qkv.shape[0], -1, 2, half)
    turning = heads.shape[1] - kv_heads
    c, s = (table[positions.long()][:, None] for table in (cos, sin))
    if inverse:
        s = -s
    first, second = heads[:, :turning].unbind(2)
    result = out.view(heads.shape)
    result[:, :turning, 0] = first * c - second * s
    result[:, :turning, 1] = second * c + first * s
    result[:, turning:] = heads[:, turning:]
    return out


def glu(x: Tensor, out: Tensor) -> Tensor:
    """Gate: `out = silu(gate) * up` with `gate, up = x.chunk(2, -1)`, rounded once.

    x: `[rows, 2 * n]`; out: `[rows, n]`.
    """
    gate, up = _wide(x).chunk(2, -1)
    return out.copy_(F.silu(gate) * up)


def glu_backward(x: Tensor, grad: Tensor, dx: Tensor) -> Tensor:
    """With `s = sigmoid(gate)`: `dgate = grad * up * s * (1 + gate * (1 - s))`, `dup = grad * gate * s`.

    x, dx: `[rows, 2 * n]`, gate first; grad: `[rows, n]`.
    """
    gate, up = _wide(x).chunk(2, -1)
    upstream, s = _wide(grad), torch.sigmoid(gate)
    dgate, dup = dx.chunk(2, -1)
    dgate.copy_(upstream * up * s * (1 + gate * (1 - s)))
    dup.copy_(upstream * gate * s)
    return dx


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, losses: Tensor, *, gradient: bool) -> Tensor:
    """Compute `losses = log(sum(exp(logits))) - logits[label]`, and in place of the logits their gradient.

    logits: `[rows, channels, vocab]`, with `gradient` overwritten by `weights[channel] * (softmax(logits) - onehot)`;
    labels: `[rows, channels]` int64, what is negative counts for nothing; weights: `[channels]` float32; losses:
    `[rows, channels]` float32 (float64 beside float64), unweighted, 0 where the label is negative.
    """
    wide = _wide(logits)
    known = labels >= 0
    index = labels.clamp(min=0)[..., None]
    total = torch.logsumexp(wide, -1)
    losses.copy_(torch.where(known, total - wide.gather(-1, index)[..., 0], 0))
    if gradient:
        # In place: `wide` is either the logits or a copy that nobody else has.
        wide.sub_(total[..., None]).exp_()
        wide.scatter_add_(-1, index, wide.new_full((), -1.0).expand(index.shape))
        wide.mul_((known * weights)[..., None])
        if wide is not logits:
            logits.copy_(wide)
    return losses


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
