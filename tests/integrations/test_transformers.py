"""`accelerate(model).generate` against the model's own, token for token, and what it does with every argument."""

import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DiaConfig, DiaForConditionalGeneration, GenerationConfig, StoppingCriteria
from transformers.generation import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from bench.tools.tiny_models import tiny_config
from dia_fast.errors import InputError, NumericError
from dia_fast.integrations.transformers import FallbackWarning, accelerate, patch, unaccelerate
from tests.integrations.models import CONFIG, TINY_VOCABULARY, greedy, inputs, make_model, same_as_own, unaccelerated

pytestmark = [
    pytest.mark.filterwarnings("error::dia_fast.integrations.transformers.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*max_new_tokens.*max_length"),
]


@pytest.fixture
def model() -> DiaForConditionalGeneration:
    return accelerate(make_model())


@pytest.mark.parametrize("guidance_scale", [None, 1.0, 3.0])
@pytest.mark.parametrize("eos_gain", [0.0, 2.5], ids=["never ends", "ends"])
@pytest.mark.parametrize(
    "limit", [{"max_new_tokens": 40}, {"max_length": 35, "max_new_tokens": None}], ids=["new", "length"]
)
@pytest.mark.parametrize(
    "prompts",
    [pytest.param((0,), marks=pytest.mark.slow), (9,), pytest.param((0, 0, 0), marks=pytest.mark.slow), (0, 12, 5)],
    ids=str,
)
def test_same_tokens(
    prompts: tuple[int, ...], limit: dict[str, Any], eos_gain: float, guidance_scale: float | None
) -> None:
    model = accelerate(make_model(eos_gain=eos_gain))
    batch = inputs(texts=(17, 5, 40)[: len(prompts)], prompts=prompts)
    rows = same_as_own(model, batch, **greedy(guidance_scale=guidance_scale, **limit))
    known = max(prompts) + 1
    assert rows.shape[0] == len(prompts) and rows.shape[2] == 9 and rows.dtype == torch.int64
    assert torch.equal(rows[:, :known], batch["decoder_input_ids"][:, :known])
    limit_rows = 35 + 15 if "max_length" in limit else known + 40
    forced = limit_rows - 16
    ends = (rows[:, known:, 0] == CONFIG.decoder.eos_token_id).nonzero()[:, 1] + known
    if eos_gain == 0:
        assert rows.shape[1] == limit_rows and (ends == forced).all()
        assert len(rows[0, known:].unique()) > 60, "rows that repeat prove little"
    else:
        assert int(ends.min()) < forced, "no item has ended by itself"


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_grid(data: st.DataObject) -> None:
    """Grids that no processor makes: no delay, none given at all, codes of every kind, text padded on either side."""
    draw = data.draw
    config = TINY_VOCABULARY
    model = accelerate(make_model(config, seed=draw(st.integers(0, 9)), eos_gain=draw(st.sampled_from((0.0, 1.5)))))
    torch.manual_seed(draw(st.integers(0, 99)))
    batch = draw(st.integers(1, 3), label="batch")
    length = draw(st.integers(1, 9), label="text")
    given: dict[str, Tensor] = {"input_ids": torch.randint(0, config.encoder.vocab_size, (batch, length))}
    if draw(st.booleans(), label="mask"):
        cuts = [draw(st.integers(0, length - 1)) for _ in range(batch)]
        left = draw(st.booleans(), label="left")
        mask = torch.ones(batch, length, dtype=torch.long)
        for row, cut in zip(mask, cuts, strict=True):
            row[slice(0, cut) if left else slice(length - cut, length)] = 0
        given["attention_mask"] = mask
    if draw(st.booleans(), label="rows"):
        rows = draw(st.integers(1, 6))
        grid = torch.randint(0, config.decoder.vocab_size, (batch, rows, 3))
        grid[grid == config.decoder.pad_token_id] = 0
        given |= {"decoder_input_ids": grid, "decoder_attention_mask": torch.ones(batch, rows, dtype=torch.long)}
    scale, top_k = draw(st.sampled_from((None, 3.0))), draw(st.sampled_from((None, 1, 5)))
    limit = draw(st.integers(1, 20))
    same_as_own(model, given, **greedy(guidance_scale=scale, top_k=top_k, max_new_tokens=limit))


def test_beyond_the_positions_of_the_configuration() -> None:
    config = tiny_config(decoder={"max_position_embeddings": 30}, encoder={"max_position_embeddings": 8})
    model = accelerate(make_model(config))
    rows = same_as_own(model, inputs(config, texts=(12,), prompts=(3,)), **greedy(max_new_tokens=50))
    assert rows.shape[1] == 54


def test_settings_of_the_model_and_of_the_call(model: DiaForConditionalGeneration) -> None:
    batch = inputs(prompts=(0, 0, 0))
    model.generation_config.max_new_tokens = 20
    model.generation_config.guidance_scale = 3.0
    assert same_as_own(model, batch, do_sample=False).shape[1] == 21
    other = GenerationConfig(
        do_sample=False, max_new_tokens=18, guidance_scale=None, eos_token_id=1024, pad_token_id=1025, bos_token_id=1026
    )
    assert same_as_own(model, batch, generation_config=other).shape[1] == 19
    assert torch.equal(model.generate(batch["input_ids"], **without(batch, "input_ids"), do_sample=False),
                       model.generate(**batch, do_sample=False))  # fmt: skip


def test_a_dictionary_is_returned_when_asked_for(model: DiaForConditionalGeneration) -> None:
    batch = inputs()
    result = model.generate(**batch, **greedy(return_dict_in_generate=True))
    expected = unaccelerated(model).generate(**batch, **greedy(return_dict_in_generate=True))
    assert type(result) is type(expected)
    assert torch.equal(result.sequences, expected.sequences)
    assert result.scores is None and result.past_key_values is None


def test_arguments_and_name_stay(model: DiaForConditionalGeneration) -> None:
    own = inspect.signature(DiaForConditionalGeneration.generate)
    assert list(inspect.signature(model.generate).parameters) == list(own.parameters)[1:]
    assert type(model) is DiaForConditionalGeneration and model.generate.__name__ == "generate"


def test_unaccelerate_leaves_nothing_behind() -> None:
    model = make_model()
    batch = inputs()
    expected = model.generate(**batch, **greedy())
    before = set(model.__dict__)  # what the first call adds is transformers' own
    accelerate(model, rms_norm=True, glu=True, rope_attention=True).generate(**batch, **greedy())
    assert unaccelerate(model) is model
    assert set(model.__dict__) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model.generate(**batch, **greedy()), expected)
    unaccelerate(model)


class Rude(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("logits_processor", {"logits_processor": [Rude()]}),
        ("stopping_criteria", {"stopping_criteria": [Never()]}),
        ("prefix_allowed_tokens_fn", {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(1028))}),
        ("output_scores", {"output_scores": True, "return_dict_in_generate": True}),
        ("repetition_penalty", {"repetition_penalty": 1.5}),
        ("min_length", {"min_length": 3}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
        ("max_time", {"max_time": 100.0}),
    ],
)
@pytest.mark.filterwarnings("default::dia_fast.integrations.transformers.FallbackWarning")
def test_what_the_engine_cannot_honour_is_the_models_own(
    model: DiaForConditionalGeneration, name: str, settings: dict[str, Any]
) -> None:
    batch = inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = model.generate(**batch, **greedy(max_new_tokens=20, **settings))
    ours = [item for item in caught if item.category is FallbackWarning]
    assert len(ours) == 1 and name in str(ours[0].message)
    assert ours[0].filename == __file__, "the warning blames the caller"
    expected = unaccelerated(model).generate(**batch, **greedy(max_new_tokens=20, **settings))
    if not isinstance(result, Tensor):
        assert len(result.scores) == len(expected.scores)
        result, expected = result.sequences, expected.sequences
    assert torch.equal(result, expected)


@pytest.mark.filterwarnings("default::dia_fast.integrations.transformers.FallbackWarning")
def test_masks_with_holes_are_the_models_own(model: DiaForConditionalGeneration) -> None:
    batch = inputs()
    batch["attention_mask"][0, 3] = 0
    with pytest.warns(FallbackWarning, match="attention_mask"):
        same_as_own(model, batch, **greedy(max_new_tokens=18))


def test_errors_are_those_of_transformers(model: DiaForConditionalGeneration) -> None:
    batch = inputs()
    plain = unaccelerated(model)
    for wrong in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"guidance_scale": 0.5}):
        with pytest.raises(ValueError) as theirs:
            plain.generate(**batch, **greedy(**wrong))
        with pytest.raises(ValueError) as ours:
            model.generate(**batch, **greedy(**wrong))
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="nonsense"):
        with pytest.warns(FallbackWarning):
            model.generate(**batch, nonsense=3)


def test_engines_are_kept_while_they_fit(model: DiaForConditionalGeneration) -> None:
    state = model.__dict__[patch.STATE]
    same_as_own(model, inputs(), **greedy(max_new_tokens=16))
    first = state._engine
    same_as_own(model, inputs(texts=(20, 30, 3)), **greedy(max_new_tokens=20, guidance_scale=None))
    assert state._engine is first
    same_as_own(model, inputs(texts=(5,) * 4, prompts=(0, 0, 3, 2)), **greedy(max_new_tokens=16))
    assert state._engine is not first
    same_as_own(model, inputs(texts=(5,) * 35, prompts=(0,) * 35), **greedy(max_new_tokens=3))


def test_threads(model: DiaForConditionalGeneration) -> None:
    """Calls of several threads at once, the first of which pack the weights and make the engine."""
    batches = [inputs(texts=(10 + index,), prompts=(index,)) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda batch: model.generate(**batch, **greedy(max_new_tokens=20)), batches))
    plain = unaccelerated(model)
    for batch, own in zip(batches, rows, strict=True):
        assert torch.equal(own, plain.generate(**batch, **greedy(max_new_tokens=20)))


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.ended = True


def test_streamer(model: DiaForConditionalGeneration) -> None:
    """The prompt first, as transformers has it, then a column of `batch * channels` codes for each row."""
    batch, listener, own = inputs(), Listener(), Listener()
    rows = model.generate(**batch, **greedy(), streamer=listener)
    unaccelerated(model).generate(**batch, **greedy(), streamer=own)
    assert listener.ended and len(listener.heard) == len(own.heard)
    assert torch.equal(listener.heard[0], own.heard[0])
    heard = torch.stack(listener.heard[1:], 1).view(3, 9, -1).transpose(1, 2)
    assert torch.equal(heard, rows[:, 13:])


def test_a_streamer_hears_each_row_when_it_is_there(model: DiaForConditionalGeneration) -> None:
    class Interrupting(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.heard) == 10:
                raise KeyboardInterrupt

    listener = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs(), **greedy(max_new_tokens=3000), streamer=listener)
    stats = model.__dict__[patch.STATE]._engine.stats
    assert stats.steps < 15 and stats.running == 0 and stats.pages == 0


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="DiaForConditionalGeneration"):
        accelerate(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="backend"):
        accelerate(make_model(), backend="magic")
    config = DiaConfig(**CONFIG.to_transformers())
    config.decoder_config.hidden_act = "gelu"
    with pytest.raises(Exception, match="hidden_act"):
        accelerate(DiaForConditionalGeneration(config))


def test_the_engine_is_what_runs(model: DiaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    speak = patch.loop.speak
    monkeypatch.setattr(patch.loop, "speak", lambda *args, **kwargs: calls.append(1) or speak(*args, **kwargs))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model itself has run"))
    unhooked = model._forward_pre_hooks.copy()
    monkeypatch.setattr(patch.weights.Watch, "obstacle", lambda *_: None)
    model.generate(**inputs(), **greedy(max_new_tokens=16))
    assert calls == [1] and unhooked


def without(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != name}


@pytest.mark.parametrize("do_sample", [True, False])
def test_an_accelerated_model_says_it_as_well(do_sample: bool) -> None:
    """The model's own sampling raises an error of torch there, and its greedy search goes on with code 0."""
    model = accelerate(make_model())
    with torch.no_grad():
        model.model.decoder.norm.weight[3] = float("nan")
    batch = inputs()
    with pytest.raises(NumericError, match="NaN or infinity.*damaged"):
        model.generate(**batch, do_sample=do_sample, max_new_tokens=20, guidance_scale=3.0)
    with torch.no_grad():
        model.model.decoder.norm.weight[3] = 1.0
    same_as_own(model, batch, **greedy(max_new_tokens=20))
