"""The whole model on the Triton op set: torch's tokens, the planned launches, no allocation."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.tools.tiny_models import tiny_config
from dia_fast.engine import Request, Session, generate
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, INT8, INT8_MLP, quantized_names
from dia_kernels import get_ops
from dia_kernels import launcher as launch
from dia_kernels.reference.quantized import quantize
from tests.kernels.support import random

TEXTS = ([1, 72, 105, 46], [2, 72, 101, 108, 108, 111])


def config() -> DiaConfig:
    """Two layers with shared heads, three channels and a short delay: few programs, every branch of every op."""
    decoder = {"num_channels": 3, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32}
    codes = {"eos_token_id": 36, "pad_token_id": 37, "bos_token_id": 38}
    return tiny_config({"num_hidden_layers": 1}, decoder | codes, delay_pattern=(0, 2, 3))


def model(
    ops: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    first_generation: bool = False,
    weights: str = FLOAT,
) -> DiaModel:
    """Random weights, large enough that tokens vary; EOS a little likelier than the rest, so that some requests end."""
    made = DiaModel(replace(config(), first_generation=first_generation), ops)
    tensors = {
        name: random(p.shape, dtype, device, seed, 0.6 if p.ndim == 2 else 1.0)
        for seed, (name, p) in enumerate(made.state_dict().items())
    }
    return made.load(tensors | {name: quantize(tensors[name]) for name in quantized_names(made.config, weights)})


def requests(greedy: bool, rows: int) -> list[Request]:
    """Two requests of different length, one of them with an audio prompt."""
    prompt = torch.randint(0, 36, (5, 3), generator=torch.Generator().manual_seed(1))
    common = {"max_new_tokens": rows, "temperature": 0.0 if greedy else 1.3, "top_k": 12}
    return [
        Request(TEXTS[0], prompt=prompt, seed=3, **common),
        Request(TEXTS[1], seed=4, **common),
    ]


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [6, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first_generation", [False, True])
def test_tokens_equal_those_of_torch(first_generation: bool, greedy: bool, rows: int, device: torch.device) -> None:
    asked = requests(greedy, rows)
    expected = generate(model(get_ops("torch"), device, first_generation=first_generation), asked)
    got = generate(model(get_ops("triton", device), device, first_generation=first_generation), asked)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.delayed_codes, theirs.delayed_codes)
        assert torch.equal(mine.frames, theirs.frames)
    assert any(len(generation.delayed_codes[6:].unique()) > 3 for generation in got), (
        "the tokens hardly vary: this shows little"
    )


@pytest.mark.parametrize("weights", [INT8, INT8_MLP])
def test_tokens_equal_those_of_torch_by_weights_in_8_bits(weights: str, device: torch.device) -> None:
    asked = requests(True, 6)
    expected = generate(model(get_ops("torch"), device, weights=weights), asked)
    got = generate(model(get_ops("triton", device), device, weights=weights), asked)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.delayed_codes, theirs.delayed_codes)


def ready_state(made: DiaModel, guided: bool) -> DecodeState:
    """One request whose text is stored and whose next step is its first."""
    state = DecodeState(made.config, made.ops, Sizes(1, guided, 40, 8, 4, 1), made.dtype, made.device)
    state.grow(0, 40)
    state.cross_blocks.grow(0, 8)
    state.step.zero_()
    state.end_step.fill_(30)
    state.text_lengths.fill_(4)
    return state


class _Refuses(TorchDispatchMode):
    """Raises at every torch operation that is not a view: nothing else could have run without allocating."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            raise AssertionError(f"{func} ran inside a decode step")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("first_generation", [False, True])
@pytest.mark.parametrize("guided", [True, False])
def test_a_step_is_its_launches_and_nothing_else(guided: bool, first_generation: bool, device: torch.device) -> None:
    made = model(get_ops("triton", device), device, first_generation=first_generation)
    state = ready_state(made, guided)
    names: list[str] = []

    def note(run: launch.Launcher, kernel, grid, args, meta) -> None:
        names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)

    with launch.listening(note), _Refuses():
        made.decode_step(state)
    layer = [
        "_rms_norm_linear",
        "_rope_attention",
        "_linear_residual",
        "_rms_norm_linear",
        "_cross_attention",
        "_linear_residual",
        "_rms_norm_glu",
        "_linear_residual",
    ]
    assert names == ["_embed_codes", *layer * 2, "_codebook_logits", "_sample"]
    assert len(names) == 8 * made.config.decoder.num_hidden_layers + 3


@pytest.mark.parametrize("first_generation", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pass_of_several_steps_has_their_bits(first_generation: bool, device: torch.device) -> None:
    made = model(get_ops("triton", device), device, torch.bfloat16, first_generation)
    asked = requests(False, 20)[1:]
    session, plain = Session(made, asked, capture=None), Session(made, asked, capture=None)
    expected = []
    for _ in range(3):
        plain.step()
        expected.append((plain.tensors.logits.clone(), plain.tensors.sampled.clone()))
    verified = session.verify(torch.stack([sampled for _, sampled in expected[:2]]))
    assert verified.agreed.all()
    for j, (logits, sampled) in enumerate(expected):
        assert torch.equal(verified.logits[j], logits) and torch.equal(verified.sampled[j], sampled)
    for ours, theirs in zip(session.results(), plain.results(), strict=True):
        assert torch.equal(ours.delayed_codes, theirs.delayed_codes)
    for one in (session, plain):
        one.step(layers=[1])
    assert torch.equal(session.tensors.logits, plain.tensors.logits), "keys and values are the same"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_to_the_end(dtype: torch.dtype, device: torch.device) -> None:
    [got] = generate(model(get_ops("triton", device), device, dtype), requests(False, 5)[1:])
    assert got.frames.shape == (5 - 3 - 1, 3)
    assert int(got.frames.max()) < 36
