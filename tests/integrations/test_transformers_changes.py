"""`accelerate` sees every change of a model, takes nothing harmless for one, and ignores no argument."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DiaForConditionalGeneration
from transformers.models.dia import modeling_dia

from dia_fast.integrations.transformers import FallbackWarning, accelerate, unaccelerate
from tests.integrations.models import CONFIG, greedy, inputs, make_model, same_as_own

SHORT = greedy(max_new_tokens=18)


@pytest.fixture
def model() -> DiaForConditionalGeneration:
    return accelerate(make_model())


def own(model: Any, given: dict[str, Any], **settings: Any) -> torch.Tensor:
    """The rows of the same modules, buffers and numbers without the engine."""
    return unaccelerate(copy.deepcopy(model)).generate(**given, **settings)


def fused_step(model: Any, which: Callable[[str], bool] = lambda name: True) -> None:
    parameters = [parameter for name, parameter in model.named_parameters() if which(name)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters, lr=0.3, fused=True).step()


@pytest.mark.parametrize("share_memory", [True, False])
def test_a_fused_step_is_followed(share_memory: bool) -> None:
    """Of the encoder alone: only constants computed ahead follow from it where the weights are shared."""
    model = accelerate(make_model(), share_memory=share_memory)
    given = inputs()
    first = model.generate(**given, **SHORT)
    fused_step(model, lambda name: "encoder." in name)
    again = model.generate(**given, **SHORT)
    assert torch.equal(again, own(model, given, **SHORT)) and not torch.equal(first, again)


@pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="16-bit weights are not packed here"
)
def test_a_fused_step_is_followed_by_packed_weights() -> None:
    model, fresh = (accelerate(make_model().to(torch.bfloat16), share_memory=False) for _ in range(2))
    given = inputs()
    first = model.generate(**given, **SHORT)
    torch.manual_seed(8)
    fused_step(model)
    torch.manual_seed(8)
    fused_step(fresh)
    again = model.generate(**given, **SHORT)
    assert torch.equal(again, fresh.generate(**given, **SHORT)) and not torch.equal(first, again)


def test_tied_weights_and_data_are_followed(model: DiaForConditionalGeneration) -> None:
    attention = model.model.decoder.layers[0].self_attention
    attention.v_proj.weight = attention.k_proj.weight
    given = inputs()
    first = model.generate(**given, **SHORT)
    attention.k_proj.weight.data.mul_(-2)
    again = model.generate(**given, **SHORT)
    assert torch.equal(again, own(model, given, **SHORT)) and not torch.equal(first, again)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_other_frequencies_are_followed(model: DiaForConditionalGeneration, stack: str) -> None:
    given = inputs()
    model.generate(**given, **SHORT)
    for module in getattr(model.model, stack).modules():  # the attribute's name has changed between versions
        if isinstance(module, modeling_dia.DiaRotaryEmbedding):
            module.inv_freq.mul_(3)
    assert torch.equal(model.generate(**given, **SHORT), own(model, given, **SHORT))


@pytest.mark.parametrize("change", ["scaling", "cross scaling", "eps", "activation", "offsets"])
def test_other_numbers_go_the_model_s_own_way(model: DiaForConditionalGeneration, change: str) -> None:
    given = inputs()
    model.generate(**given, **SHORT)
    layer: Any = model.model.decoder.layers[0]
    if change == "scaling":
        layer.self_attention.scaling = 0.25
    elif change == "cross scaling":
        layer.cross_attention.scaling = 0.25
    elif change == "eps":
        model.model.decoder.norm.variance_epsilon = 0.5
    elif change == "activation":
        layer.mlp.activation_fn = torch.nn.GELU()
    else:
        model.model.decoder.embeddings.offsets.zero_()
    with pytest.warns(FallbackWarning):
        rows = model.generate(**given, **SHORT)
    assert torch.equal(rows, own(model, given, **SHORT))


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_a_call_that_looks_inside_does_not_end_acceleration(
    model: DiaForConditionalGeneration, recwarn: pytest.WarningsRecorder, name: str
) -> None:
    given = inputs()
    expected = model.generate(**given, **SHORT)
    with pytest.warns(FallbackWarning, match=name):
        model.generate(**given, **SHORT, return_dict_in_generate=True, **{name: True})
    recwarn.clear()
    assert torch.equal(model.generate(**given, **SHORT), expected)
    assert not [item for item in recwarn if issubclass(item.category, FallbackWarning)]
    model.model.decoder.norm.register_forward_hook(lambda *_: None)
    with pytest.warns(FallbackWarning, match="hooks"):
        model.generate(**given, **SHORT)


def test_a_rotation_that_is_a_module(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """As transformers 5.0 has it beside the package kernels; one of the user's own is another matter."""
    rotate = modeling_dia.apply_rotary_pos_emb

    class Rotation(torch.nn.Module):
        def forward(self, *args: Any, **settings: Any) -> Any:
            return rotate(*args, **settings)

    model, given = make_model(), inputs()
    expected = model.generate(**given, **SHORT)
    monkeypatch.setattr(modeling_dia, "apply_rotary_pos_emb", Rotation())
    model.model.decoder.layers[0].self_attention.rotary_fn = modeling_dia.apply_rotary_pos_emb
    assert torch.equal(accelerate(model).generate(**given, **SHORT), expected)
    assert not [item for item in recwarn if issubclass(item.category, FallbackWarning)]
    model.model.decoder.layers[0].self_attention.rotary_fn = torch.nn.Identity()
    with pytest.warns(FallbackWarning, match="rotary_fn is a"):
        model.generate(**given, **SHORT)


def test_a_model_built_in_inference_mode(recwarn: pytest.WarningsRecorder) -> None:
    with torch.inference_mode():
        model = accelerate(make_model())
    given = inputs()
    expected = make_model().generate(**given, **SHORT)
    assert torch.equal(model.generate(**given, **SHORT), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(**given, **SHORT), expected)
        model.model.encoder.embedding.weight.mul_(-3)
        model.model.decoder.layers[0].self_attention.k_proj.weight.mul_(-1)
        again = model.generate(**given, **SHORT)
    plain = make_model()
    with torch.no_grad():
        plain.model.encoder.embedding.weight.mul_(-3)
        plain.model.decoder.layers[0].self_attention.k_proj.weight.mul_(-1)
    assert torch.equal(again, plain.generate(**given, **SHORT))
    assert not [item for item in recwarn if issubclass(item.category, FallbackWarning)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_implementation", "static"), ("prefill_chunk_size", 2), ("use_cache", False), ("low_memory", True),
     ("top_k", CONFIG.decoder.vocab_size + 1)],
)  # fmt: skip
def test_no_argument_is_ignored(model: DiaForConditionalGeneration, name: str, value: Any) -> None:
    given, settings = inputs(), SHORT | {name: value}

    def outcome(generate: Callable[..., torch.Tensor]) -> Any:
        try:
            return generate(**given, **settings).tolist()
        except Exception as error:
            return type(error), str(error)

    with pytest.warns(FallbackWarning, match=name):
        ours = outcome(model.generate)
    assert ours == outcome(make_model().generate)
    same_as_own(model, given, **SHORT)
