"""The errors of weights in 8 bits: of each matrix, and of the logits along a passage that the model itself speaks."""

import gc
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dia_fast.checkpoint.loading import Checkpoint
from dia_fast.diagnostics.doctor import Verdict
from dia_fast.engine import Request, generate
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import quantized_names
from dia_kernels.reference.quantized import quantize

TEXT = "[S1] Are eight bits enough for a voice? [S2] Listen to this one, and count the words that you do not hear."
MOST_KL = 0.003  # mean, in nats
LEAST_OVERLAP = 0.97
TOP = 45  # ids: the default of top-k


class LogitErrors(NamedTuple):
    """Guided distributions against those of the stored weights.

    kl: mean Kullback-Leibler divergence in nats; argmax: share of equal likeliest ids; overlap: mean share of the
    `TOP` likeliest ids that are in both; compared: distributions.
    """

    kl: float
    argmax: float
    overlap: float
    compared: int

    @property
    def verdict(self) -> Verdict:
        """Fit for use or not."""
        fit = self.kl <= MOST_KL and self.overlap >= LEAST_OVERLAP
        told = (
            f"logits: mean KL {self.kl:.5f} (at most {MOST_KL}), top-{TOP} overlap {self.overlap:.1%} (at least "
            f"{LEAST_OVERLAP:.0%}), likeliest id equal {self.argmax:.1%}, {self.compared} distributions"
        )
        return Verdict("weights", "ok" if fit else "wrong", told, self.kl / MOST_KL)


def signal_to_noise(weight: Tensor) -> float:
    """Of a matrix in 8 bits: power of the weight over power of the rounding error, in dB."""
    error = (quantize(weight).unpack() - weight.float()).square().sum(dtype=torch.float64)
    power = weight.float().square().sum(dtype=torch.float64)
    return math.inf if not error else 10 * math.log10(float(power / error)) if power else 0.0


def layer_verdicts(checkpoint: Checkpoint, weights: str) -> list[Verdict]:
    """For each layer the signal-to-noise ratio of its worst matrix. Stored integers are compared with themselves."""
    layers: dict[str, list[tuple[float, str]]] = {}
    for fused in quantized_names(checkpoint.config, weights):
        layer, _, name = fused.rpartition(".")
        layers.setdefault(layer, []).append((signal_to_noise(checkpoint.load_fused(fused)), name))
    return [
        Verdict(layer, "ok", f"SQNR at least {min(found)[0]:.1f} dB ({min(found)[1]}), {len(found)} matrices")
        for layer, found in layers.items()
    ]


def logit_errors(
    checkpoint: Checkpoint, weights: str, ops: ModuleType, device: torch.device, steps: int
) -> LogitErrors:
    """Speaks `TEXT` with the stored weights, and forces the same codes on both models. One is in memory at a time.

    Both compute in float32: rounding of activations to 16 bits would hide what rounding of weights does.
    """
    dtype = torch.float32
    ids = list(TEXT.replace("[S1]", "\x01").replace("[S2]", "\x02").encode())
    scale = checkpoint.defaults.guidance_scale or 1.0
    model = DiaModel(checkpoint.config, ops).load(checkpoint.load_as("float", dtype, device)).pack()
    [spoken] = generate(model, [Request(ids, max_new_tokens=steps, guidance_scale=scale, seed=1)])
    codes = spoken.delayed_codes[None]
    stored = _distributions(model, ids, codes, scale)
    del model
    gc.collect()
    rounded = DiaModel(checkpoint.config, ops).load(checkpoint.load_as(weights, dtype, device)).pack()
    return compare(stored, _distributions(rounded, ids, codes, scale))


def compare(stored: Tensor, rounded: Tensor) -> LogitErrors:
    """Two sets of log-probabilities, `[distributions, ids]` float32."""
    kl = (stored.exp() * (stored - rounded)).sum(-1).double().mean()
    top = min(TOP, stored.shape[1])
    mine, other = (
        torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(top).indices, True) for x in (stored, rounded)
    )
    overlap = (mine & other).sum(-1).double().mean() / top
    same = (stored.argmax(-1) == rounded.argmax(-1)).double().mean()
    return LogitErrors(float(kl), float(same), float(overlap), len(stored))


def _distributions(model: DiaModel, ids: list[int], codes: Tensor, scale: float) -> Tensor:
    """Of the codes that are sound: what the model says of pads, in front of and behind the delay, is never heard."""
    eos = model.config.decoder.eos_token_id
    cond, uncond = model.forward_logits([ids], codes[:, :-1], guidance=scale != 1.0)
    guided = cond if uncond is None else cond + scale * (cond - uncond)
    heard = (codes[:, 1:] < eos).to(guided.device)
    return guided[heard][:, :eos].log_softmax(-1).cpu()
