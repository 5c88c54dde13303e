"""The first generation of Dia-1.6B against its rules in plain torch, written here from the original's weights up.

The unconditional text is really encoded, masks are really built, and texts are padded, as in the original: the engine's
short cuts (one constant for the unconditional cross-attention, texts at their real length) must not show.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.tools.pairs import pack, random_grid, random_prompts, random_texts
from bench.tools.tiny_models import make_original_checkpoint, original_state, random_state, tiny_config
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import convert, save_pretrained
from dia_fast.engine import Generation, Request, generate
from dia_fast.errors import CheckpointError
from dia_fast.model.config import DiaConfig
from dia_fast.model.model import DiaModel
from dia_fast.training import Example, batch_loss, build_batch
from dia_kernels import get_ops, reference
from tests.helpers.tolerance import EVALUATIONS, assert_equal_up_to_rounding, assert_same_numbers, nudged, of_weights

CONFIG = replace(tiny_config({}, {"max_position_embeddings": 384}), first_generation=True)
DELAY = CONFIG.delay_pattern


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x: `[n, heads, head_dim]`."""
    half = x.shape[-1] // 2
    wavelength = 10_000 ** (2.0 * torch.arange(half) / x.shape[-1])
    angle = positions[:, None, None] / wavelength
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q: `[n, heads, d]`, k, v: `[m, kv_heads, d]`, mask: `[n, m]`; no scale."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k).masked_fill(~mask, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


class Plain:
    """Encoder and decoder in plain torch on the tensors of the original package."""

    def __init__(self, config: DiaConfig, state: dict[str, Tensor]) -> None:
        self.config, self.state = config, original_state(config, state)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.state[f"{name}.weight"], 1e-5)

    def _heads(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("ni,ihd->nhd", x, self.state[f"{name}.weight"])

    def _out(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("nhd,hdo->no", x, self.state[f"{name}.o_proj.weight"])

    def _self_attention(self, x: Tensor, name: str, mask: Tensor) -> Tensor:
        positions = torch.arange(len(x))
        q, k = (rotate(self._heads(x, f"{name}.{part}_proj"), positions) for part in "qk")
        return self._out(attend(q, k, self._heads(x, f"{name}.v_proj"), mask), name)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up = torch.einsum("ni,isf->snf", x, self.state[f"{name}.wi_fused.weight"])
        return F.silu(gate) * up @ self.state[f"{name}.wo.weight"]

    def encode(self, ids: Tensor, real: Tensor) -> Tensor:
        """ids: `[length]`; real: which of the conditional text's are no padding."""
        x, mask = self.state["encoder.embedding.weight"][ids], real[:, None] == real[None, :]
        for layer in range(self.config.encoder.num_hidden_layers):
            name = f"encoder.layers.{layer}"
            x = x + self._self_attention(self._norm(x, f"{name}.pre_sa_norm"), f"{name}.self_attention", mask)
            x = x + self._mlp(self._norm(x, f"{name}.post_sa_norm"), f"{name}.mlp")
        return self._norm(x, "encoder.norm")

    def logits(self, rows: Tensor, text: list[int], conditional: bool) -> Tensor:
        """The prediction after each row, `[rows, channels, vocab]`."""
        length = self.config.encoder.max_position_embeddings
        ids = F.pad(torch.tensor(text), (0, length - len(text)))
        real = ids != 0
        memory = self.encode(ids if conditional else torch.zeros_like(ids), real)
        x = sum(self.state[f"decoder.embeddings.{c}.weight"][rows[:, c]] for c in range(rows.shape[1]))
        assert isinstance(x, Tensor)
        causal, seen = torch.ones(len(x), len(x)).tril().bool(), real.expand(len(x), -1)
        for layer in range(self.config.decoder.num_hidden_layers):
            name = f"decoder.layers.{layer}"
            x = x + self._self_attention(self._norm(x, f"{name}.pre_sa_norm"), f"{name}.self_attention", causal)
            cross = f"{name}.cross_attention"
            q = rotate(self._heads(self._norm(x, f"{name}.pre_ca_norm"), f"{cross}.q_proj"), torch.arange(len(x)))
            k = rotate(self._heads(memory, f"{cross}.k_proj"), torch.arange(length))
            x = x + self._out(attend(q, k, self._heads(memory, f"{cross}.v_proj"), seen), cross)
            x = x + self._mlp(self._norm(x, f"{name}.pre_mlp_norm"), f"{name}.mlp")
        return torch.einsum("ni,icv->ncv", self._norm(x, "decoder.norm"), self.state["decoder.logits_dense.weight"])


def guided(cond: Tensor, uncond: Tensor, scale: float, eos: int) -> Tensor:
    """`[..., channels, vocab]`: guidance, what no channel may say, and the damped end of speech."""
    mixed = cond + scale * (cond - uncond)
    mixed[..., eos + 1 :] = -torch.inf
    mixed[..., 1:, eos:] = -torch.inf
    mixed[..., 0, eos] *= 0.8
    return mixed


def probabilities(scores: Tensor, temperature: float, top_k: int | None, top_p: float, eos: int) -> Tensor:
    """The distribution that one code is drawn from. scores: `[codes, vocab]`, of `guided`."""
    scores = scores.double() / temperature  # in double: what it is compared with is float32
    beaten = scores.argmax(-1) != eos
    scores[beaten, eos] = -torch.inf
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    ordered, ids = scores.softmax(-1).sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    if top_p < 1:
        dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, before > top_p)
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores.softmax(-1)


@functools.cache
def models(eos_gain: float = 1.0) -> tuple[Plain, DiaModel]:
    state = random_state(CONFIG_TRANSFORMERS, 3)
    state["logits_dense.weight"][CONFIG.decoder.eos_token_id] *= eos_gain
    return Plain(CONFIG, state), DiaModel(CONFIG, get_ops("torch")).load(pack(CONFIG, state))


CONFIG_TRANSFORMERS = replace(CONFIG, first_generation=False)  # the same tensors


def made(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


def test_logits() -> None:
    plain, model = models()
    texts, rows = random_texts(CONFIG, [5, 40, 128]), random_grid(CONFIG, 3, 300)
    found = of_weights(model, lambda: torch.stack([*map(made, model.forward_logits(texts, rows))]))
    for item, text in enumerate(texts):
        for branch, conditional in enumerate((True, False)):
            expected = plain.logits(rows[item], text, conditional)
            assert_equal_up_to_rounding(expected, [both[branch, item] for both in found], f"text {item}")


def test_the_generations_differ() -> None:
    _, model = models()
    other = DiaModel(CONFIG_TRANSFORMERS, get_ops("torch")).load(model.state_dict())
    texts, rows = random_texts(CONFIG, [40]), random_grid(CONFIG, 1, 60)
    ours, theirs = (made.forward_logits(texts, rows)[0] for made in (model, other))
    assert float((ours - theirs).abs().max()) > 0.1


def assert_greedy(result: Generation, text: list[int], frames: int, scale: float | None, eos_gain: float) -> int:
    """Every code that the model chose is the best one after the rows before it; returns how many rows were chosen."""
    plain, eos = models(eos_gain)[0], CONFIG.decoder.eos_token_id
    rows = result.delayed_codes.long()
    cond, uncond = (plain.logits(rows, text, conditional) for conditional in (True, False))
    best = guided(cond, uncond, scale or 0.0, eos).argmax(-1)
    ends = [row for row in range(frames + 1, len(rows)) if rows[row, 0] == eos]
    end = ends[0] if ends else len(rows)
    assert end == len(rows) or not result.truncated or end >= len(rows) - max(DELAY) - 1
    for channel, delay in enumerate(DELAY):
        first, last = frames + 1 + delay, min(end + delay, len(rows))
        if not (channel == 0 and result.truncated):
            last = min(last + (channel == 0), len(rows))
        assert torch.equal(rows[first:last, channel], best[first - 1 : last - 1, channel]), channel
    return len(rows) - frames - 1


CASES: list[tuple[float, list[int], list[int], float | None]] = [
    (0.0, [17, 5, 64, 128], [0, 0, 25, 11], 3.0),
    (0.0, [30, 9], [0, 7], None),
    (0.0, [12, 77], [40, 3], 1.5),
    (4.0, [3, 8, 13, 21, 34], [0, 12, 0, 5, 20], 3.0),
]


@pytest.mark.parametrize(("eos_gain", "lengths", "frames", "scale"), CASES)
def test_greedy_codes(eos_gain: float, lengths: list[int], frames: list[int], scale: float | None) -> None:
    texts, prompts = random_texts(CONFIG, lengths), random_prompts(CONFIG, frames)
    requests = [Request(text, prompt, 270, scale, temperature=0.0) for text, prompt in zip(texts, prompts, strict=True)]
    results = generate(models(eos_gain)[1], requests)
    zipped = zip(results, texts, frames, strict=True)
    rows = [assert_greedy(result, text, count, scale, eos_gain) for result, text, count in zipped]
    if eos_gain == 0:
        assert min(rows) == 270
        assert all(len(result.delayed_codes.unique()) > 200 for result in results), "rows that repeat prove little"
    else:
        assert any(not result.truncated for result in results)


def nudged_pair(logits: Tensor, seed: int) -> Tensor:
    """Logits as they are for seed 0, else moved by a rounding."""
    return nudged(logits, seed) if seed else logits


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 0.5, 1.5, 3.0, -2.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.2, 1.8]),
    top_k=st.sampled_from([None, 1, 5, 45]),
    top_p=st.sampled_from([0.3, 0.9, 0.95, 1.0]),
    eos_shift=st.sampled_from([-30.0, 0.0, 12.0, 14.0, 60.0]),
)
def test_probabilities(
    seed: int, scale: float, temperature: float, top_k: int | None, top_p: float, eos_shift: float
) -> None:
    eos = 1024
    logits = torch.randn(2, 9, 1028, generator=torch.Generator().manual_seed(seed)) * 4
    logits[:, 0, eos] += eos_shift
    single = logits.clone()
    one = torch.ones(1)
    got = reference.sample_weights(
        logits, one * scale, one * temperature, torch.tensor([top_k or 0], dtype=torch.int32), one * top_p, eos=eos,
        first_generation=True,
    ).double()  # fmt: skip
    got /= got.sum(-1, keepdim=True)
    expected, *moved = (
        probabilities(guided(*nudged_pair(single, seed), scale, eos), temperature, top_k, top_p, eos)
        for seed in range(EVALUATIONS)
    )
    # Weights are whole numbers of 2^-30; the best has 1.
    allowed = 4 * max(float((item - expected).abs().max()) for item in moved) + 2.0**-23 + 1028 * 2.0**-30
    assert float((got[0] - expected).abs().max()) <= allowed


def test_the_damped_end_of_speech() -> None:
    """EOS is the best by less than a fifth: damped, it is out. A negative one is raised."""
    for logit, other, wins in ((5.0, 4.5, False), (6.0, 4.5, True), (-5.0, -4.5, True)):
        logits = torch.full((1, 2, 12), -20.0)
        logits[0, :, 8], logits[0, :, 3] = logit, other
        one = torch.ones(1)
        weights = reference.sample_weights(
            logits, one, one, torch.tensor([0], dtype=torch.int32), one, eos=8, first_generation=True
        )
        assert bool(weights[0, 0, 8] > 0) is wins and weights[0, 0, 3] > 0
        assert weights[0, 1, 8] == 0


def test_training_computes_what_inference_does() -> None:
    """Two examples of different length: positions meet in cross-attention, so that padding must not shift them."""
    _, model = models()
    pairs = list(zip(random_texts(CONFIG, [20, 7]), random_prompts(CONFIG, [40, 25]), strict=True))

    def totals() -> Tensor:
        losses = [batch_loss(model, build_batch([Example(*item)], CONFIG)).total for item in pairs]
        return torch.stack((losses[0], losses[0] + losses[1])).detach()

    found = [item.tolist() for item in of_weights(model, totals)]
    both = batch_loss(model, build_batch([Example(*item) for item in pairs], CONFIG))
    text, codes = pairs[0]
    batch = build_batch([Example(text, codes)], CONFIG)
    cond, _ = model.forward_logits([text], batch.delayed_codes, guidance=False)
    total = F.cross_entropy(cond[0].flatten(0, 1), batch.labels[0].flatten(), ignore_index=-100, reduction="sum")
    assert_same_numbers([float(total), float(both.total)], found, "loss")


def test_files(tmp_path: Path) -> None:
    """Recognised by its configuration, rewritten in its own layout, refused in the other's."""
    source = make_original_checkpoint(tmp_path / "source", CONFIG_TRANSFORMERS, 3, file="pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(CONFIG.to_original()))
    opened = open_checkpoint(source)
    assert opened.config == CONFIG and opened.layout == "original"
    weights = opened.load()
    for folder in (
        convert(source, tmp_path / "converted", "original"),
        save_pretrained(tmp_path / "saved", CONFIG, weights),
    ):
        again = open_checkpoint(folder)
        assert again.config == CONFIG
        assert all(torch.equal(tensor, weights[name]) for name, tensor in again.load().items())
    with pytest.raises(CheckpointError, match=r"no transformers layout.*'original'"):
        convert(source, tmp_path / "no", "transformers")
    assert not (tmp_path / "no").exists()


def nested(**changes: Any) -> dict[str, Any]:
    data = CONFIG.to_original()
    for path, value in changes.items():
        *parents, name = path.split("__")
        inner = data
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
    return data


def test_configuration_of_the_published_model() -> None:
    data = {
        "version": "0.1",
        "model": {
            "encoder": {"n_layer": 12, "n_embd": 1024, "n_hidden": 4096, "n_head": 16, "head_dim": 128,
                        "mlp_activations": ["silu", "linear"], "use_pre_norm": False},
            "decoder": {"n_layer": 18, "n_embd": 2048, "n_hidden": 8192, "gqa_query_heads": 16, "kv_heads": 4,
                        "gqa_head_dim": 128, "cross_query_heads": 16, "cross_head_dim": 128},
            "src_vocab_size": 256, "tgt_vocab_size": 1028, "dropout": 0.0, "normalization_layer_epsilon": 1e-05,
            "rope_min_timescale": 1, "rope_max_timescale": 10000,
        },
        "training": {"dtype": "bfloat16", "logits_dot_in_fp32": False},
        "data": {"text_length": 1000, "audio_length": 3072, "channels": 9, "delay_pattern": list(DELAY)},
    }  # fmt: skip
    assert DiaConfig.from_dict(data) == DiaConfig(first_generation=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__encoder": None}, r"model\.encoder must be an object"),
        ({"model__decoder__kv_heads": "four"}, r"model\.decoder\.kv_heads must be an integer"),
        ({"model__rope_min_timescale": 2}, "only 1 is supported"),
        ({"data__text_pad_value": 3}, "only 0 is supported"),
        ({"data__delay_pattern": 3}, "must be a list"),
        ({"data": {}}, r"data\.text_length must be"),
        ({"data": 1}, "data must be an object"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiaConfig.from_dict(nested(**change))
    data = CONFIG.to_original()
    del data["model"]["decoder"]["n_embd"]
    with pytest.raises(CheckpointError, match=r"model\.decoder\.n_embd is missing"):
        DiaConfig.from_dict(data)


def test_what_the_nested_form_cannot_say() -> None:
    with pytest.raises(CheckpointError, match="multiples of 128"):
        replace(tiny_config(), first_generation=True).to_original()
