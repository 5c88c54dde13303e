"""The torch references of the generation ops against independent formulas: random numbers, sampling, the grid."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dia_kernels import reference
from tests.helpers.tolerance import nudged, sum_bound

WORD = 2**32


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python's integers, from the description in Salmon et al. 2011."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right // WORD ^ c[1] ^ k[0], right % WORD, left // WORD ^ c[3] ^ k[1], left % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_words_give_the_published_answers(counter: str, key: str, expected: str) -> None:
    """Known answers of Random123; they vouch for the function above, which vouches for the reference below."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert philox_words(words[0], words[1]) == words[2]


@given(seed=st.integers(-(2**63), 2**63 - 1), c0=st.integers(-(2**31), 2**31 - 1), c1=st.integers(0, 2**31 - 1))
def test_philox(seed: int, c0: int, c1: int) -> None:
    got = reference.philox(torch.tensor(seed), torch.tensor(c0, dtype=torch.int32), torch.tensor(c1, dtype=torch.int32))
    assert got.item() == philox_words([c0 % WORD, c1 % WORD, 0, 0], [seed % WORD, seed // WORD % WORD])[0]


def test_philox_of_zero_is_the_published_one() -> None:
    zero = torch.zeros(3, dtype=torch.int64)
    assert reference.philox(zero, zero, zero).tolist() == [0x6627E8D5] * 3


@dataclass
class Choice:
    """Parameters of one request."""

    scale: float
    temperature: float
    top_k: int
    top_p: float


def naive_probabilities(
    cond: list[float], uncond: list[float] | None, channel: int, choice: Choice, eos: int
) -> list[float]:
    """One request and channel in Python floats, step by step as docs/dia.md tells it. Needs scores without ties."""
    candidates = dict(enumerate(cond))
    if uncond is not None and choice.scale != 1:
        guided = {i: c + choice.scale * (c - u) for i, (c, u) in enumerate(zip(cond, uncond, strict=True))}
        if choice.top_k > 0:
            best = sorted(guided, key=lambda i: -guided[i])[: choice.top_k]
            candidates = {i: cond[i] for i in best}
        else:
            candidates = guided
    candidates = {i: s for i, s in candidates.items() if i < eos or (channel == 0 and i == eos)}
    if channel == 0 and candidates:
        winner = max(candidates, key=lambda i: candidates[i])
        candidates = {i: s for i, s in candidates.items() if (i == eos) == (winner == eos)}
    ranked = sorted(candidates, key=lambda i: -candidates[i])
    if choice.top_k > 0:
        ranked = ranked[: choice.top_k]
    if not ranked:
        return [1.0] + [0.0] * (len(cond) - 1)
    if choice.temperature == 0:
        return [float(i == ranked[0]) for i in range(len(cond))]
    weights = {i: math.exp((candidates[i] - candidates[ranked[0]]) / choice.temperature) for i in ranked}
    total, before, kept = sum(weights.values()), 0.0, []
    for i in ranked:
        assume(abs(before / total - choice.top_p) > 1e-5)  # at the border rounding decides
        if before / total <= choice.top_p:
            kept.append(i)
        before += weights[i]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(cond))]


choices = st.builds(
    Choice,
    scale=st.sampled_from([1.0, 1.5, 3.0, 8.0]),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 3, 10, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)


def params_of(requests: list[Choice]) -> dict[str, torch.Tensor]:
    columns = {"guidance_scale": [s.scale for s in requests], "temperature": [s.temperature for s in requests]}
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    top_k = torch.tensor([s.top_k for s in requests], dtype=torch.int32)
    return tensors | {"top_k": top_k, "top_p": torch.tensor([s.top_p for s in requests])}


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(choices, min_size=1, max_size=3),
    paired=st.booleans(),
    vocab=st.integers(5, 40),
    eos_is_good=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_sample_weights(requests: list[Choice], paired: bool, vocab: int, eos_is_good: bool, seed: int) -> None:
    """Slots of one batch each with settings of their own."""
    batch, channels, eos = len(requests), 2, vocab - 4
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch * (2 if paired else 1), channels, vocab, generator=generator) * 2
    logits[:batch, 0, eos] += 10 if eos_is_good else -1
    weights = reference.sample_weights(logits, **params_of(requests), eos=eos)
    assert weights.dtype == torch.int64 and (weights >= 0).all()
    for b, choice in enumerate(requests):
        for channel in range(channels):
            uncond = logits[batch + b, channel].tolist() if paired else None
            expected = torch.tensor(naive_probabilities(logits[b, channel].tolist(), uncond, channel, choice, eos))
            got = weights[b, channel].double() / weights[b, channel].sum()
            moved = [
                naive_probabilities(
                    nudged(logits[b, channel], n).tolist(),
                    nudged(logits[batch + b, channel], 100 + n).tolist() if paired else None,
                    channel, choice, eos,
                )
                for n in range(7)
            ]  # fmt: skip
            # Weights are whole numbers of 2^-30; the best has 1.
            allowed = (
                4 * max((torch.tensor(item) - expected).abs().max() for item in moved) + 2.0**-23 + vocab * 2.0**-30
            )
            assert (got - expected).abs().max() <= allowed, (b, channel, got - expected)
            assert not got[expected == 0].any(), "an id outside the allowed set"


def test_ties_go_to_the_lower_id() -> None:
    """At a width where an unstable sort would shuffle them."""
    logits = torch.zeros(1, 2, 1028)
    for top_k, top_p, kept in ((300, 1.0, 300), (0, 0.25, 257), (1, 1.0, 1)):
        weights = reference.sample_weights(logits, **params_of([Choice(1.0, 1.0, top_k, top_p)]), eos=1024)
        assert weights[0, 1].count_nonzero() == kept and weights[0, 1, :kept].all()


def test_the_weights_of_nothing() -> None:
    """With top_k = 1, and the best guided id one that may not be sampled, no candidate is left."""
    logits = torch.zeros(1, 2, 12)
    logits[..., 11] = 5
    weights = reference.sample_weights(
        torch.cat((logits, logits * 0.5)), **params_of([Choice(3.0, 1.0, 1, 1.0)]), eos=8
    )
    assert weights[0].count_nonzero(-1).tolist() == [1, 1] and weights[0, :, 0].all()


@settings(max_examples=100, deadline=None)
@given(
    choice=choices,
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(-1, 3100),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_sample_draws_by_exact_integers(choice: Choice, seed: int, step: int, spread: float) -> None:
    """The drawn id is where `floor(u * total / 2^32)` falls in the cumulative weights, on integers without a limit."""
    channels, vocab, eos = 3, 30, 26
    logits = torch.randn(2, channels, vocab, generator=torch.Generator().manual_seed(seed % 1000)) * spread
    out = torch.full((1, channels), -7, dtype=torch.int32)
    arguments = params_of([choice])
    steps, seeds, status = torch.tensor([step], dtype=torch.int32), torch.tensor([seed]), torch.zeros_like(out)
    reference.sample(logits, steps, seeds, **arguments, out=out, status=status, eos=eos)
    if step < 0:
        assert out.tolist() == [[-7] * channels]
        return
    for channel, weights in enumerate(reference.sample_weights(logits, **arguments, eos=eos)[0].tolist()):
        word = philox_words([step, channel, 0, 0], [seed % WORD, seed // WORD % WORD])[0]
        target, drawn = word * sum(weights) // WORD, 0
        while target >= weights[drawn]:
            target -= weights[drawn]
            drawn += 1
        assert out[0, channel] == drawn and weights[drawn] > 0


@pytest.mark.parametrize(("word", "drawn"), [(0, 0), (2**30 - 1, 0), (2**30, 1), (3 * 2**30, 3), (2**32 - 1, 3)])
def test_a_draw_on_the_border_belongs_to_the_next_id(word: int, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four equal ids share the 32-bit words."""
    monkeypatch.setattr("dia_kernels.reference.sampling.philox", lambda seed, c0, c1: torch.full_like(c1, word))
    out, one = torch.empty(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    arguments = params_of([Choice(1.0, 1.0, 0, 1.0)])
    reference.sample(torch.zeros(1, 1, 4), one, one.long(), **arguments, out=out, status=torch.zeros_like(out), eos=4)
    assert out.item() == drawn


def test_sampled_frequencies() -> None:
    """Steps and channels are independent draws: over many of both, frequencies approach the probabilities."""
    requests, channels, vocab = 20_000, 3, 9
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0)).expand(requests, channels, vocab)
    arguments = params_of([Choice(1.0, 1.0, 0, 1.0)] * requests)
    out = torch.empty(requests, channels, dtype=torch.int32)
    seeds, rows = torch.full((requests,), 5), torch.arange(requests, dtype=torch.int32)
    reference.sample(logits.contiguous(), rows, seeds, **arguments, out=out, status=torch.zeros_like(out), eos=vocab)
    expected = logits[0, 0].double().softmax(-1) * requests
    for channel in range(channels):
        counts = out[:, channel].long().bincount(minlength=vocab)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 31.8, f"chi-square {statistic:.1f}; above 31.8 once in 10,000 with 8 degrees of freedom"


class Grid:
    """The delayed codes of one request, told step by step from docs/dia.md: each step, and the end."""

    def __init__(
        self, delay: list[int], first_step: int, end_step: int, forced: list[list[int]], eos: int, pad: int
    ) -> None:
        self.delay, self.first_step, self.end_step, self.forced = delay, first_step, end_step, forced
        self.eos, self.pad = eos, pad
        self.step, self.eos_step, self.finished = first_step, None, False
        self.rows: dict[int, list[int]] = {}

    def advance(self, sampled: list[int]) -> list[int]:
        r, longest = self.step, max(self.delay)
        given = self.forced[r - self.first_step] if r - self.first_step < len(self.forced) else [-1] * len(sampled)
        codes = [f if f >= 0 else s for f, s in zip(given, sampled, strict=True)]
        if self.eos_step is None and r > self.first_step:
            if r == self.end_step - longest:
                codes[0] = self.eos
            if codes[0] == self.eos:
                self.eos_step = r
        if self.eos_step is not None:
            for channel, delay in enumerate(self.delay):
                if r == self.eos_step + delay:
                    codes[channel] = self.eos
                elif r > self.eos_step + delay:
                    codes[channel] = self.pad
        self.rows[r] = codes
        self.step += 1
        self.finished = r >= self.end_step or (self.eos_step is not None and r >= self.eos_step + longest)
        return codes


@settings(max_examples=60, deadline=None)
@given(data=st.data(), paired=st.booleans(), seed=st.integers(0, 2**32))
def test_embed_codes_forms_the_delayed_grid(data: st.DataObject, paired: bool, seed: int) -> None:
    """A batch of requests that start, end and rest at different steps, run to the end."""
    generator = torch.Generator().manual_seed(seed)
    channels, vocab, hidden, eos, pad = data.draw(st.integers(1, 4)), 9, 3, 6, 7
    delay = [0, *(data.draw(st.integers(0, 5)) for _ in range(channels - 1))]
    batch, depth, capacity = data.draw(st.integers(1, 3)), max(delay) + 1, 24
    first = [data.draw(st.integers(0, 4)) for _ in range(batch)]
    end = [f + data.draw(st.integers(1, 17)) for f in first]
    resting = [data.draw(st.integers(0, 4)) == 0 for _ in range(batch)]
    forced = torch.randint(-1, vocab, (batch, depth, channels), generator=generator, dtype=torch.int32)
    grids = [Grid(delay, f, e, given, eos, pad) for f, e, given in zip(first, end, forced.tolist(), strict=True)]
    table = torch.randn(channels * vocab, hidden, generator=generator)

    rows = 2 * batch if paired else batch
    state = {
        "step": torch.tensor([-1 if rest else f for f, rest in zip(first, resting, strict=True)], dtype=torch.int32),
        "first_step": torch.tensor(first, dtype=torch.int32),
        "end_step": torch.tensor(end, dtype=torch.int32),
        "eos_step": torch.full((batch,), -1, dtype=torch.int32),
        "delay": torch.tensor(delay, dtype=torch.int32),
        "codes": torch.full((batch, capacity, channels), -9, dtype=torch.int32),
        "positions": torch.empty(rows, dtype=torch.int32),
        "finished": torch.zeros(batch, dtype=torch.int32),
    }
    for _ in range(capacity):
        sampled = torch.randint(0, vocab, (batch, channels), generator=generator, dtype=torch.int32)
        x = torch.full((rows, hidden), torch.nan)
        assert reference.embed_codes(sampled, forced, table=table, x=x, eos=eos, pad=pad, **state) is x
        for b, grid in enumerate(grids):
            live = not resting[b] and not grid.finished
            position, expected = -1, torch.zeros(hidden, dtype=torch.float64)
            magnitude = expected
            if live:
                position, codes = grid.step, grid.advance(sampled[b].tolist())
                terms = torch.stack([table[c * vocab + code].double() for c, code in enumerate(codes)])
                expected, magnitude = terms.sum(0), terms.abs().sum(0)
            for r in (b, batch + b) if paired else (b,):
                assert state["positions"][r] == position
                assert ((x[r].double() - expected).abs() <= sum_bound(channels, magnitude)).all()
    for b, grid in enumerate(grids):
        if resting[b]:
            assert state["step"][b] == -1 and (state["codes"][b] == -9).all()
            continue
        assert grid.finished and state["finished"][b] == 1 and state["step"][b] == grid.step
        assert state["eos_step"][b] == (-1 if grid.eos_step is None else grid.eos_step)
        written = {r: codes for r, codes in enumerate(state["codes"][b].tolist()) if codes != [-9] * channels}
        assert written == grid.rows
