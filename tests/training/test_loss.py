"""The loss: weights of channels, dropped texts, narrow dtypes, and that it falls."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tools.pairs import pack
from bench.tools.tiny_models import random_state, tiny_config
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.training import Batch, Example, batch_loss, build_batch, drop_conditions
from dia_fast.training.forward import Forward
from dia_kernels import get_ops
from tests.helpers.tolerance import (
    EVALUATIONS,
    assert_equal_up_to_rounding,
    assert_same_numbers,
    nudged_weights,
    of_weights,
)

CONFIG = tiny_config()


@pytest.fixture
def model() -> DiaModel:
    return DiaModel(CONFIG, get_ops("torch")).load(pack(CONFIG, random_state(CONFIG))).requires_grad_(True)


def some_batch(sizes: tuple[tuple[int, int], ...] = ((11, 14), (6, 9))) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return build_batch(
        [
            Example(
                torch.randint(1, 256, (text,), generator=generator).tolist(),
                torch.randint(0, 1024, (frames, 9), generator=generator),
            )
            for text, frames in sizes
        ],
        CONFIG,
    )


def test_channel_weights(model: DiaModel) -> None:
    batch, weights = some_batch(), torch.linspace(4, 0, 9)
    loss = batch_loss(model, batch, channel_weights=weights)

    def plain() -> Tensor:
        hidden = Forward(model, torch.float32, {}).hidden_states(batch)
        logits = F.linear(hidden, model.decoder.head).view(*batch.labels.shape, -1)
        each = F.cross_entropy(logits.flatten(0, 2), batch.labels.flatten(), ignore_index=-100, reduction="none")
        each = each.view(batch.labels.shape)
        total = (each * weights).sum()
        gradient = torch.autograd.grad(total, model.decoder.head)[0]
        mean = total / (25 * weights.sum())
        return torch.cat((torch.stack((total, mean)), each.sum((0, 1)), gradient.flatten())).detach()

    found = of_weights(model, plain)
    assert_same_numbers(
        [loss.total.item(), loss.mean.item(), *loss.sums.tolist()], [item[:11].tolist() for item in found]
    )
    assert loss.counts.tolist() == [25] * 9
    got = torch.autograd.grad(loss.total, model.decoder.head)[0]
    assert_equal_up_to_rounding(got.flatten(), [item[11:] for item in found], "gradient")
    assert not got[8 * 1028 :].any(), "a channel of weight 0 teaches nothing"


def test_an_item_without_text_is_the_unconditional_branch_of_guidance(model: DiaModel) -> None:
    """The engine gets it from a constant of the checkpoint; here it goes through the encoder."""
    batch = some_batch(((11, 14),))
    dropped = drop_conditions(batch, 1.0, torch.Generator().manual_seed(0))

    def plain() -> Tensor:
        with torch.no_grad():
            hidden = Forward(model, torch.float32, {}).hidden_states(dropped)
        return F.linear(hidden, model.decoder.head.detach()).view(*batch.labels.shape, -1)

    _, uncond = model.forward_logits(batch.text.tolist(), batch.delayed_codes)
    assert uncond is not None
    assert_equal_up_to_rounding(uncond, of_weights(model, plain))


def test_bf16_is_near_and_gradients_keep_the_dtype_of_the_weights(model: DiaModel) -> None:
    batch = some_batch()
    # What rounding the weights to bfloat16 does, rounding the activations may do as well.
    moved, exact = [], batch_loss(model, batch)
    for seed in range(1, EVALUATIONS):
        with nudged_weights(model, seed, torch.bfloat16), torch.no_grad():
            moved.append(abs(batch_loss(model, batch).mean.item() - float(exact.mean)))
    exact, rounded = batch_loss(model, batch), batch_loss(model, batch, dtype=torch.bfloat16)
    assert rounded.total.dtype == torch.float32
    assert abs(rounded.mean.item() - exact.mean.item()) <= 4 * max(moved)
    rounded.mean.backward()
    wanted = torch.autograd.grad(exact.mean, list(model.parameters()))
    for (name, weight), want in zip(model.named_parameters(), wanted, strict=True):
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        similar = F.cosine_similarity(weight.grad.flatten(), want.flatten(), dim=0)
        assert similar > 0.9, f"{name}: {similar}"


def test_evaluation_makes_no_gradients(model: DiaModel) -> None:
    batch = some_batch()
    with torch.no_grad():
        loss = batch_loss(model, batch)
    assert not loss.total.requires_grad
    found = of_weights(model, lambda: batch_loss(model, batch).total.detach())
    assert_same_numbers([loss.total.item()], [[item.item()] for item in found])


def test_every_weight_learns(model: DiaModel) -> None:
    batch = some_batch()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert before.keys() == fused_shapes(CONFIG).keys()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = batch_loss(model, batch).mean
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
