"""One copy of the weights: what is shared, what a change of the weights does, what the engine must not take over."""

import copy
import io
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DiaForConditionalGeneration

from bench.tools.pairs import random_grid
from dia_fast.errors import InputError
from dia_fast.integrations.transformers import (
    FallbackWarning,
    accelerate,
    modules,
    patch,
    refresh,
    unaccelerate,
)
from tests.helpers.tolerance import EVALUATIONS, assert_equal_up_to_rounding, assert_same_numbers, nudged_weights
from tests.integrations.models import CONFIG, greedy, inputs, make_model, same_as_own, unaccelerated

SHORT = greedy(max_new_tokens=18)


@pytest.fixture
def model() -> DiaForConditionalGeneration:
    return accelerate(make_model())


def packed(model: Any) -> dict[str, Tensor]:
    ours = model.__dict__[patch.STATE]._ours
    assert ours is not None
    return ours.state_dict()


def shared_bytes(model: Any, packed: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes of the fused weights that are the model's own memory, bytes that are a copy)."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = [(tensor.untyped_storage().data_ptr() in own, tensor.nbytes) for tensor in packed.values()]
    return sum(size for mine, size in sizes if mine), sum(size for mine, size in sizes if not mine)


def test_weights_are_there_once(model: DiaForConditionalGeneration) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same_as_own(model, inputs(), **SHORT)
    own, copied = shared_bytes(model, packed(model))
    assert copied == 0 and own == sum(parameter.nbytes for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    refresh(model)
    same_as_own(model, inputs(), **SHORT)
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}, "moved once only"
    unaccelerate(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_when_asked_for(dtype: torch.dtype) -> None:
    """The model's parameters stay where they are, and the engine still follows them; in 16 bit its copy is packed."""
    model, sharing = (make_model().to(dtype) for _ in range(2))
    accelerate(model, share_memory=False), accelerate(sharing)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    batch, rows = inputs(), []
    for _ in range(2):
        rows.append(model.generate(**batch, **SHORT))
        if dtype == torch.float32:
            assert torch.equal(rows[-1], sharing.generate(**batch, **SHORT))
        with torch.no_grad():
            for other in (model, sharing):
                other.model.decoder.layers[0].self_attention.k_proj.weight.mul_(-1)
    assert not torch.equal(*rows)
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    model.generate(**batch, **greedy(max_new_tokens=400))  # beyond the positions it was made for


def train_step(model: DiaForConditionalGeneration) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    torch.manual_seed(5)
    grid, labels = random_grid(CONFIG, 2, 12), torch.randint(0, 1024, (18, 12))
    loss = model(**inputs(texts=(9, 4), prompts=(0, 0)) | {"decoder_input_ids": grid, "decoder_attention_mask": None},
                 labels=labels).loss  # fmt: skip
    loss.backward()
    optimizer.step()
    return float(loss)


def test_training_is_as_before_and_generation_follows_it(model: DiaForConditionalGeneration) -> None:
    plain = make_model()
    first = same_as_own(model, inputs(prompts=(0, 0, 0)), **SHORT)
    assert train_step(model) == train_step(plain)
    for ours, own in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, own) and torch.equal(ours.grad, own.grad)
    assert not torch.equal(same_as_own(model, inputs(prompts=(0, 0, 0)), **SHORT), first)


@pytest.mark.parametrize("change", ["load", "assign", "in place", "encoder", "cast", "data"])
def test_changed_weights_are_noticed(model: DiaForConditionalGeneration, change: str) -> None:
    """`encoder`: only the unconditional constants follow from it, and those are computed ahead."""
    batch = inputs()
    first = same_as_own(model, batch, **SHORT)
    state = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        if change in ("load", "assign"):
            model.load_state_dict(state, assign=change == "assign")
        elif change == "in place":
            model.model.decoder.layers[0].self_attention.k_proj.weight.mul_(-1)
        elif change == "encoder":
            model.model.encoder.embedding.weight.mul_(-3)
        elif change == "cast":
            model.to(torch.float64).to(torch.float32)
        else:
            model.model.encoder.embedding.weight.data.mul_(-3)
            refresh(model)
    again = same_as_own(model, batch, **SHORT)
    assert torch.equal(first, again) == (change == "cast")
    assert shared_bytes(model, packed(model))[1] == 0


def test_the_memory_is_let_go_when_weights_move(model: DiaForConditionalGeneration) -> None:
    same_as_own(model, inputs(), **SHORT)
    model.to(torch.bfloat16)
    assert model.__dict__[patch.STATE]._ours is None
    assert model.generate(**inputs(), **SHORT).shape[0] == 3
    assert model.__dict__[patch.STATE]._ours.dtype == torch.bfloat16


def test_tied_weights_are_copied_and_followed() -> None:
    model = make_model()
    attention = model.model.encoder.layers[0].self_attention
    attention.k_proj.weight = attention.q_proj.weight
    accelerate(model)
    first = same_as_own_with_ties(model)
    with torch.no_grad():
        attention.q_proj.weight.mul_(-1)
    assert attention.k_proj.weight is attention.q_proj.weight
    same_as_own_with_ties(model)
    assert shared_bytes(model, packed(model))[1] == 3 * attention.q_proj.weight.nbytes
    assert len(first)


def same_as_own_with_ties(model: DiaForConditionalGeneration) -> Tensor:
    return same_as_own(model, inputs(), **SHORT)


class Adapter(nn.Module):
    """The layer that an adapter library puts in the place of a linear one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.added = nn.Parameter(torch.randn_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.added)


def test_modules_that_the_engine_does_not_know(model: DiaForConditionalGeneration) -> None:
    first = same_as_own(model, inputs(), **SHORT)
    attention = model.model.decoder.layers[1].self_attention
    base, attention.q_proj = attention.q_proj, Adapter(attention.q_proj)
    with pytest.warns(FallbackWarning, match=r"decoder\.layers\.1\.self_attention\.q_proj is a .*Adapter"):
        adapted = model.generate(**inputs_again(), **SHORT)
    assert torch.equal(adapted, DiaForConditionalGeneration.generate(unaccelerate(model), **inputs_again(), **SHORT))
    accelerate(model)
    attention.q_proj = base
    assert torch.equal(model.generate(**inputs_again(), **SHORT), same_as_own(model, inputs_again(), **SHORT))
    assert len(first)


def inputs_again() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return inputs()


def test_hooks_and_replaced_methods_go_the_models_own_way(model: DiaForConditionalGeneration) -> None:
    heard = []
    layer = model.model.decoder.layers[0]
    hook = layer.register_forward_hook(lambda *_: heard.append(1))
    with pytest.warns(FallbackWarning, match="hooks"):
        model.generate(**inputs(), **SHORT)
    assert len(heard) == 18
    hook.remove()
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: own(x) * 2
    with pytest.warns(FallbackWarning, match="mlp has had its forward method replaced"):
        model.generate(**inputs(), **SHORT)
    del layer.mlp.forward
    same_as_own(model, inputs(), **SHORT)


def test_saved_files_are_whole(model: DiaForConditionalGeneration, tmp_path: Path) -> None:
    batch = inputs()
    expected = same_as_own(model, batch, **SHORT)
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert files.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in files.items())
    again = DiaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**batch, **SHORT), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.2 * sum(parameter.nbytes for parameter in model.parameters())


def test_copies_stand_on_their_own(model: DiaForConditionalGeneration) -> None:
    accelerate(model, rms_norm=True, glu=True, rope_attention=True)
    batch = inputs()
    expected = same_as_own(model, batch, **SHORT)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.logits_dense.weight.neg_()
    assert not torch.equal(same_as_own(other, batch, **SHORT), expected)
    assert torch.equal(same_as_own(model, batch, **SHORT), expected)
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(pickled.generate(**batch, **SHORT), expected)
    assert torch.equal(accelerate(pickled).generate(**batch, **SHORT), expected)


FLAGS = ["rms_norm", "glu", "rope_attention"]


@pytest.mark.parametrize("flags", [*([flag] for flag in FLAGS), FLAGS], ids=str)
def test_single_kernels_in_the_models_own_modules(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and scores agree to rounding, and the ops are what ran."""
    model, plain = make_model(), make_model()
    used: set[str] = set()
    for flag, op in zip(FLAGS, ("rms_norm", "glu", "rope"), strict=True):
        own = getattr(modules.differentiable, op)
        spy = lambda *args, own=own, flag=flag: used.add(flag) or own(*args)  # noqa: E731
        monkeypatch.setattr(modules.differentiable, op, spy)
    accelerate(model, generate=False, **dict.fromkeys(flags, True))
    loss = train_step(model)
    assert used == set(flags)
    losses, gradients = [], []
    for moved in range(EVALUATIONS):
        with nudged_weights(plain, moved) if moved else nullcontext():
            plain.zero_grad()
            losses.append([train_step(plain)])
            gradients.append([weight.grad.clone() for weight in plain.parameters()])
    assert_same_numbers([loss], losses, "loss")
    for (name, ours), *own in zip(model.named_parameters(), *gradients, strict=True):
        assert_equal_up_to_rounding(ours.grad, own, name)
    assert "generate" not in model.__dict__
    batch = inputs()
    assert torch.equal(model.generate(**batch, **SHORT), unaccelerated(model).generate(**batch, **SHORT))


def test_attention_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attn_implementation="dia_fast"`: whole sequences by the kernel; masks, caches and gradients by torch."""
    from dia_fast.integrations.transformers import attention

    model = make_model()
    calls = []
    kernel = attention.library.ragged_attention
    monkeypatch.setattr(attention.library, "ragged_attention", lambda *args: calls.append(1) or kernel(*args))
    whole = {"input_ids": torch.randint(1, 255, (3, 11)), "decoder_input_ids": random_grid(CONFIG, 3, 15)}
    padded = whole | {"attention_mask": (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()}
    with torch.no_grad():
        expected = [model(**given).logits for given in (whole, padded)]
        model.set_attn_implementation("dia_fast")
        for given, logits in zip((whole, padded), expected, strict=True):
            torch.testing.assert_close(model(**given).logits, logits)
    decoder, encoder = CONFIG.decoder.num_hidden_layers, CONFIG.encoder.num_hidden_layers
    assert len(calls) == 2 * decoder + encoder  # the padded text goes through torch
    model(**whole).logits.sum().backward()
    assert len(calls) == 2 * decoder + encoder
    accelerate(model)
    same_as_own(model, inputs(), **SHORT)


def test_refresh_needs_an_accelerated_model() -> None:
    with pytest.raises(InputError, match="not accelerated"):
        refresh(make_model())
