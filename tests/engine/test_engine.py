"""The engine by itself: independence of requests, limits, settings, and what a step may do."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.tools.tiny_models import tiny_config
from dia_fast import engine
from dia_fast.engine import Generation, Request, generate
from dia_fast.errors import InputError, NumericError, OutOfPages
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops, reference

CONFIG = tiny_config()
CHANNELS, EOS = CONFIG.decoder.num_channels, CONFIG.decoder.eos_token_id
MAX_DELAY = max(CONFIG.delay_pattern)


def random_model(config: DiaConfig = CONFIG, dtype: torch.dtype = torch.float32, ops: Any = None) -> DiaModel:
    """Weights scaled so that logits differ by a few units and EOS comes up now and then."""
    weights = {}
    for name, shape in fused_shapes(config).items():
        scale = 1.0 if "embedding" in name else 0.7 * shape[-1] ** -0.5
        weights[name] = (torch.randn(shape) * scale if len(shape) == 2 else 1 + 0.1 * torch.randn(shape)).to(dtype)
    weights["decoder.head"][EOS] *= 2.5
    return DiaModel(config, ops or get_ops("torch")).load(weights)


def random_request(**settings: Any) -> Request:
    text = torch.randint(1, 256, (int(torch.randint(1, 60, ())),)).tolist()
    frames = int(torch.randint(0, 20, ()))
    prompt = torch.randint(0, EOS, (frames, CHANNELS)) if frames > 5 else None
    return Request(text, prompt, **{"max_new_tokens": 30, "seed": 5} | settings)


def admit(model: DiaModel, state: DecodeState, batch_idx: int, request: Request) -> None:
    """Put a request at a batch index by hand, at the table index of the same number."""
    item = engine.plan(model.config, request)
    state.cross_blocks.grow(batch_idx, len(request.text_ids))
    state.grow(batch_idx, item.first + 1)
    for _ in engine.prefill(model, state, batch_idx, item):
        pass
    engine.place(state, batch_idx, item)


def assert_same(ours: Generation, other: Generation) -> None:
    assert torch.equal(ours.delayed_codes, other.delayed_codes)
    assert torch.equal(ours.frames, other.frames)
    assert (ours.seed, ours.truncated) == (other.seed, other.truncated)


@pytest.mark.parametrize("count", [2, 8, 32])
@pytest.mark.parametrize("scale", [3.0, None])
def test_requests_that_fit_a_batch_run_as_one(count: int, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pages are counted exactly: none is kept back for those that will never need another."""
    model, batches = random_model(), list[int]()
    step = DiaModel.decode_step

    def counted(self: DiaModel, state: DecodeState) -> None:
        batches.append(state.batch)
        step(self, state)

    monkeypatch.setattr(DiaModel, "decode_step", counted)
    ends = [9 + (number % 3) for number in range(count)]
    generate(model, [Request([1, 2, 3], max_new_tokens=end, guidance_scale=scale, seed=1) for end in ends])
    assert batches[0] == count and len(batches) <= max(ends) + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_request_gets_the_same_codes_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    requests = [
        random_request(seed=7),
        random_request(seed=7, temperature=1.8, top_p=0.9),
        random_request(seed=2**63 - 1, top_k=None, max_new_tokens=21),
        random_request(seed=1, temperature=0.0, guidance_scale=4.0),
        random_request(seed=2, guidance_scale=None, top_k=3),
    ]
    batched = generate(model, requests)
    for request, result in zip(requests, batched, strict=True):
        assert_same(generate(model, [request])[0], result)
    shuffled = generate(model, [requests[3], requests[0]])
    assert_same(shuffled[1], batched[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_logits_of_a_request_are_the_same_to_the_bit_in_any_company(dtype: torch.dtype) -> None:
    """Codes rarely show a difference in the last bit; over thousands of rows they would."""
    config = tiny_config(decoder={"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 1})
    model = random_model(config, dtype)
    requests = [random_request(seed=seed) for seed in range(3)]

    def logits(chosen: list[int]) -> torch.Tensor:
        """`[steps, branches, requests, channels, vocab]`"""
        state = DecodeState(config, model.ops, Sizes(len(chosen), True, 90, 60, 64, 64), dtype, model.device)
        for batch_idx, index in enumerate(chosen):
            admit(model, state, batch_idx, requests[index])
            state.grow(batch_idx, 30)
        steps = []
        for _ in range(3):
            model.decode_step(state)
            steps.append(state.logits.clone().view(2, len(chosen), CHANNELS, -1))
        return torch.stack(steps)

    together = logits([2, 0, 1])
    for place, index in enumerate([2, 0, 1]):
        assert torch.equal(logits([index])[:, :, 0], together[:, :, place])


def test_another_seed_gives_other_codes_and_no_seed_a_reported_one() -> None:
    model = random_model()
    request = random_request(seed=None)
    first, second = generate(model, [request, request])
    assert first.seed != second.seed
    assert not torch.equal(first.delayed_codes, second.delayed_codes)
    again = Request(request.text_ids, request.prompt, 30, seed=first.seed)
    assert_same(generate(model, [again])[0], first)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    limit=st.integers(1, 40),
    scale=st.sampled_from((None, 1.0, 3.0)),
    temperature=st.sampled_from((0.0, 0.3, 1.2, 50.0)),
    top_k=st.sampled_from((None, 1, 45, 5000)),
    top_p=st.sampled_from((1e-6, 0.5, 1.0)),
    seed=st.integers(0, 2**63 - 1),
)
def test_whatever_the_settings_only_sounds_come_out(limit: int, scale: float | None, **chosen: Any) -> None:
    request = random_request(max_new_tokens=limit, guidance_scale=scale, **chosen)
    try:
        (result,) = generate(random_model(), [request])
    except NumericError as error:
        # The one code that guidance leaves may be one that cannot be spoken.
        assert (scale, chosen["top_k"]) == (3.0, 1) and chosen["temperature"] > 0
        assert "no code is left to draw" in str(error)
        return
    assert result.frames.dtype == torch.int64 and result.frames.shape[1] == CHANNELS
    assert ((result.frames >= 0) & (result.frames < EOS)).all()
    assert len(result.frames) <= max(limit - MAX_DELAY - 1, 0)
    prompt = 0 if request.prompt is None else len(request.prompt)
    assert len(result.delayed_codes) <= prompt + 1 + limit
    assert result.truncated == (len(result.delayed_codes) == prompt + 1 + limit)


def test_the_models_positions_are_a_limit_too() -> None:
    config = tiny_config(decoder={"max_position_embeddings": 40})
    model = random_model(config)
    model.decoder.head[EOS] = 0
    for frames in (0, 12, 39):
        prompt = torch.randint(0, EOS, (frames, CHANNELS))
        (result,) = generate(model, [Request([1, 2, 3], prompt, 3072)])
        assert len(result.delayed_codes) == 41 and result.truncated


def test_progress_counts_steps() -> None:
    seen: list[int] = []
    model = random_model()
    results = generate(model, [random_request(), random_request(max_new_tokens=20)], progress=seen.append)
    assert seen == list(range(1, len(seen) + 1))
    assert 0 < len(seen) <= max(len(result.delayed_codes) for result in results)


def test_no_requests_no_work() -> None:
    assert generate(random_model(), []) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_ids": []}, "text_ids holds 0 ids; from 1 to 128"),
        ({"text_ids": [1] * 129}, "text_ids holds 129 ids"),
        ({"text_ids": [1, 256]}, "text_ids must be from 0 to 255"),
        ({"prompt": torch.zeros(4, 8, dtype=torch.long)}, r"prompt must be integer codes of shape \[frames, 9\]"),
        ({"prompt": torch.zeros(9, dtype=torch.long)}, r"got torch.int64 of shape \[9\]"),
        ({"prompt": torch.zeros(4, 9)}, "got torch.float32"),
        ({"prompt": torch.full((4, 9), 1024)}, "codes must be from 0 to 1023, got 1024 to 1024"),
        ({"prompt": torch.full((4, 9), -1)}, "codes must be from 0 to 1023"),
        ({"prompt": torch.zeros(320, 9, dtype=torch.long)}, "320 frames and the model only 320 positions"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": 1 << 64}, "seed"),
    ],
)
def test_bad_requests_are_refused_before_any_work(arguments: dict[str, Any], message: str) -> None:
    model = DiaModel(CONFIG, get_ops("torch"))  # without weights: any work would fail
    with pytest.raises(InputError, match=message):
        generate(model, [Request(**{"text_ids": [1]} | arguments)])


def recording_ops(calls: list[str]) -> Any:
    """The torch ops, each call noted."""

    def wrap(name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            calls.append(name)
            return getattr(reference, name)(*args, **named)

        return call

    return SimpleNamespace(name="torch", **{name: wrap(name) for name in reference.__all__})


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_makes_eight_calls_a_layer_and_three_more(guided: bool) -> None:
    calls: list[str] = []
    model = random_model(ops=recording_ops(calls))
    state = one_slot(model, guided)
    calls.clear()
    model.decode_step(state)
    per_layer = ["rms_norm_linear", "rope_attention", "linear_residual", "rms_norm_linear", "cross_attention"]
    per_layer += ["linear_residual", "rms_norm_glu", "linear_residual"]
    layers = CONFIG.decoder.num_hidden_layers
    assert calls == ["embed_codes", *per_layer * layers, "codebook_logits", "sample"]
    assert Counter(calls).total() == 8 * layers + 3


def one_slot(model: DiaModel, guided: bool = True, pages: int = 64) -> DecodeState:
    state = DecodeState(CONFIG, model.ops, Sizes(1, guided, 60, 9, pages, 1), model.dtype, model.device)
    request = Request([5, 6, 7], max_new_tokens=50, guidance_scale=3.0 if guided else None, seed=3)
    admit(model, state, 0, request)
    return state


def test_a_step_keeps_its_buffers_where_they_are() -> None:
    """A captured graph relies on it."""
    model = random_model()
    model.decoder.head[EOS] = 0
    state = one_slot(model)

    def addresses() -> dict[str, int]:
        tensors = {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before = addresses()
    for step in range(40):
        state.grow(0, step + 1)
        model.decode_step(state)
    assert addresses() == before and len(before) > 20
    assert int(state.step[0]) == 40


def test_a_released_slot_gives_its_pages_back_and_stays_inert() -> None:
    model = random_model()
    state = one_slot(model)
    state.grow(0, 50)
    assert state.pool.free < 64 and state.cross_pool.free == 0
    state.release(0)
    state.clear(0)
    assert (state.pool.free, state.cross_pool.free) == (64, 1)
    for layer in state.pool.keys + state.pool.values:
        layer.fill_(7)
    model.decode_step(state)
    assert all((layer == 7).all() for layer in state.pool.keys + state.pool.values)
    assert int(state.step[0]) == -1 and (state.positions == -1).all()


def test_running_out_of_pages_takes_none() -> None:
    model = random_model()
    state = one_slot(model, pages=3)  # one for each of the two rows is taken, one is free, two more are needed
    with pytest.raises(OutOfPages, match="2 pages of 32 tokens are needed and 1 of 3 are free"):
        state.grow(0, 33)
    assert state.pool.free == 1
