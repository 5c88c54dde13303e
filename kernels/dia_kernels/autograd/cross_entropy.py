"""cross_entropy: losses = log(sum(exp(logits))) - logits[label], and in place of the logits their gradient.

    logits = weights[channel] * (softmax(logits) - onehot(label))                 # 0 where the label is negative

Training only: the part between the two matrix products of `differentiable.linear_cross_entropy`. One program per row
and channel, which keeps the channel's logits in registers: each is read once and written once.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _cross_entropy(
    logits_ptr,  # [rows, CHANNELS, VOCAB], overwritten with GRADIENT
    labels_ptr,  # [rows, CHANNELS] int64
    weights_ptr,  # [CHANNELS] float32
    losses_ptr,  # [rows, CHANNELS] float32
    CHANNELS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    inside = v < VOCAB
    label = tl.load(labels_ptr + line)
    known = label >= 0
    logits = tl.load(logits_ptr + line * VOCAB + v, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(logits, 0)
    powers = tl.exp(logits - best)
    total = tl.sum(powers, 0)
    chosen = v == label
    # Relative to the best one, where differences are exact for the labels that matter most.
    loss = tl.log(total) - tl.sum(tl.where(chosen, logits - best, 0.0), 0)
    tl.store(losses_ptr + line, tl.where(known, loss, 0.0))
    if GRADIENT:
        scale = tl.where(known, tl.load(weights_ptr + line % CHANNELS), 0.0)
        gradient = scale * (powers / total - tl.where(chosen, 1.0, 0.0))
        # Several threads may hold the same element: all of them have to have read it before one writes.
        tl.debug_barrier()
        tl.store(logits_ptr + line * VOCAB + v, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, losses: torch.Tensor, *, gradient: bool
) -> torch.Tensor:
    """As `dia_kernels.reference.gradients.cross_entropy`; all contiguous, vocab <= 32768, labels below vocab."""
    rows, channels, vocab = logits.shape
    launch.require(
        {
            "logits": (logits, logits.shape),
            "labels": (labels, (rows, channels)),
            "weights": (weights, (channels,)),
            "losses": (losses, (rows, channels)),
        }
    )
    if labels.dtype != torch.int64 or {weights.dtype, losses.dtype} != {torch.float32}:
        found = f"{labels.dtype}, {weights.dtype}, {losses.dtype}"
        raise ValueError(f"labels, weights, losses: {found}, need int64, float32, float32")
    if vocab > 32768:
        raise ValueError(f"logits: {vocab} codes are above 32768, the most that one program keeps in registers")
    if rows:
        launch.run(
            _cross_entropy,
            (rows * channels,),
            logits,
            labels,
            weights,
            losses,
            CHANNELS=channels,
            VOCAB=vocab,
            BLOCK_V=triton.next_power_of_2(vocab),
            GRADIENT=gradient,
            enable_fp_fusion=True,
            num_warps=max(1, min(8, triton.next_power_of_2(vocab) // 256)),
        )
    return losses
