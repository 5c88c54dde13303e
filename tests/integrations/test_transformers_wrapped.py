"""`accelerate` on what PEFT and torch.compile make of a model, and what is left of one that is deleted."""

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_fast.errors import InputError
from dia_fast.integrations.transformers import FallbackWarning, accelerate, refresh, unaccelerate
from tests.integrations.models import greedy, inputs, make_model

GIVEN = inputs()
SHORT = greedy(max_new_tokens=18)


class Adapted(nn.Module):
    """A layer with the attributes of PEFT's, for where PEFT is not installed."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.delta = base_layer, nn.Parameter(0.05 * torch.randn_like(base_layer.weight).double())
        self.merged = self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.base_layer.weight.data -= self.delta
            self.merged = False
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        return x @ (self.base_layer.weight + self.delta).to(x).T


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def adapted(kind: str) -> Any:
    """A model with adapters on each q and v, and its functions to merge and unmerge them."""
    model = make_model()
    torch.manual_seed(2)
    if kind == "peft":
        peft = pytest.importorskip("peft", reason="needs the package peft")
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, settings)
    for module in list(model.modules()):
        for name in ("q_proj", "v_proj"):
            if hasattr(module, name):
                setattr(module, name, Adapted(getattr(module, name)))
    return model


def merge(model: Any, on: bool) -> None:
    if hasattr(model, "merge_adapter"):
        model.merge_adapter() if on else model.unmerge_adapter()
        return
    for layer in layers(model):
        layer.base_layer.weight.data += layer.delta if on else -layer.delta
        layer.merged = on


def spoken(model: Any, falls_back: bool = False) -> Tensor:
    """The rows, by the engine or by the model itself, as is expected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows: Tensor = model.generate(**GIVEN, **SHORT)
    told = [str(item.message) for item in caught if issubclass(item.category, FallbackWarning)]
    assert bool(told) == falls_back, told
    return rows


@pytest.mark.parametrize("kind", ["stand-in", "peft"])
def test_adapters(kind: str) -> None:
    """At work they are the model's own business; merged or disabled, the engine's. It follows every change."""
    model = adapted(kind)
    with_adapters = spoken(model)
    assert accelerate(model) is model
    assert torch.equal(spoken(model, falls_back=True), with_adapters)
    merge(model, True)
    assert torch.equal(spoken(model), with_adapters) and torch.equal(spoken(model), with_adapters)
    merge(model, False)
    assert torch.equal(spoken(model, falls_back=True), with_adapters)
    for layer in layers(model):
        layer.enable_adapters(False) if kind == "peft" else setattr(layer, "disable_adapters", True)
    plain = spoken(model)
    assert not torch.equal(plain, with_adapters) and torch.equal(plain, spoken(unaccelerate(model)))


def test_disabled_adapters_that_are_merged_still() -> None:
    model = accelerate(adapted("stand-in"))
    merge(model, True)
    for layer in layers(model):
        layer.disable_adapters = True
    rows = spoken(model, falls_back=True)  # which unmerges them
    assert torch.equal(spoken(model), rows)


def test_layers_that_wrap_another_and_say_nothing_of_it() -> None:
    model = make_model()
    attention = model.model.decoder.layers[0].self_attention
    attention.q_proj = Adapted(attention.q_proj)
    del attention.q_proj.disable_adapters, attention.q_proj.merged
    attention.q_proj.forward = attention.q_proj.base_layer.forward
    spoken(accelerate(model), falls_back=True)


def test_compiled_models() -> None:
    model = make_model()
    expected, compiled = spoken(model), torch.compile(model)
    assert accelerate(compiled) is compiled
    assert torch.equal(spoken(compiled), expected) and "_dia_fast" in vars(model)
    refresh(compiled)
    assert torch.equal(spoken(compiled), expected)
    unaccelerate(compiled)
    assert "_dia_fast" not in vars(model)


def test_wrappers_that_cannot_be_looked_through() -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(InputError, match=r"not Parallel: pass its \.module$"):
        accelerate(Parallel(make_model()))
    for other in (nn.Linear(2, 2), 3):
        with pytest.raises(InputError, match=f"not {type(other).__name__}$"):
            accelerate(other)  # type: ignore[type-var]


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.usefixtures("no_collection")
def test_a_deleted_model_is_gone_at_once(share_memory: bool) -> None:
    flags = {"rms_norm": True, "glu": True, "rope_attention": True}
    model = accelerate(make_model(), share_memory=share_memory, backend="torch", **flags)
    spoken(model)
    state = vars(model)["_dia_fast"]
    parts = [weakref.ref(part) for part in (model, state, state._ours, state._engine, *model.modules())]
    parts += [weakref.ref(parameter) for parameter in model.parameters()]
    del model, state
    assert not [part() for part in parts if part() is not None]


@pytest.mark.usefixtures("no_collection")
def test_methods_that_outlive_their_model() -> None:
    model = accelerate(make_model())
    generate = model.generate
    names = list(inspect.signature(generate).parameters)
    assert names[0] == "inputs" and "self" not in names
    del model
    with pytest.raises(ReferenceError, match="generate belongs to is gone"):
        generate()


def test_copies_have_methods_of_their_own() -> None:
    model = accelerate(make_model(), rms_norm=True, backend="torch")
    expected = spoken(model)
    other = copy.deepcopy(model)
    assert other.generate.__self__ is other and other.model.decoder.norm.forward.__self__ is other.model.decoder.norm
    with torch.no_grad():
        other.logits_dense.weight.zero_()
    assert torch.equal(spoken(model), expected) and not torch.equal(spoken(other), expected)
    again = pickle.loads(pickle.dumps(unaccelerate(model)))
    assert torch.equal(spoken(accelerate(again)), expected)
