"""sample against the torch reference: the same code for the same seed, support, frequencies and random numbers."""

import json
from pathlib import Path

import pytest
import scipy.stats
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_kernels import reference
from dia_kernels.triton.sample import sample
from tests.kernels import executor
from tests.kernels.support import assert_untouched, poisoned, random

PRODUCTION_VOCAB, PRODUCTION_EOS = 1028, 1024


def request(batch: int, device: torch.device, **changes: float) -> dict[str, torch.Tensor]:
    """Parameters of `batch` equal requests, the defaults of generation unless changed."""
    values = {"guidance_scale": 3.0, "temperature": 1.2, "top_k": 45, "top_p": 0.95, "seed": 11, "step": 5} | changes
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "step": torch.int32}
    return {k: torch.full((batch,), v, dtype=dtypes.get(k, torch.float32), device=device) for k, v in values.items()}


def run(logits: torch.Tensor, req: dict[str, torch.Tensor], eos: int, op=sample, first: bool = False) -> torch.Tensor:
    out = poisoned((req["step"].shape[0], logits.shape[1]), torch.int32, logits.device)
    return op(logits=logits, **req, out=out, status=torch.zeros_like(out), eos=eos, first_generation=first)


def weights(logits: torch.Tensor, req: dict[str, torch.Tensor], eos: int) -> torch.Tensor:
    return reference.sample_weights(logits, **{k: v for k, v in req.items() if k not in ("step", "seed")}, eos=eos)


def table(folder: Path, digit: int) -> str:
    path = folder / "table.json"
    path.write_text(json.dumps({"sample": [{"use": {"DIGIT": digit}}]}))
    return str(path)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_production_vocabulary_equals_the_reference(paired: bool, first: bool, device: torch.device) -> None:
    batch = 4
    logits = random((batch * (2 if paired else 1), 3, PRODUCTION_VOCAB), torch.float32, device, 1, 4.0)
    req = request(batch, device)
    req["top_k"][1], req["top_p"][1] = 0, 1.0
    req["guidance_scale"][2] = 1.0
    req["temperature"][3] = 0.0
    got = run(logits, req, PRODUCTION_EOS, first=first)
    assert torch.equal(got, run(logits, req, PRODUCTION_EOS, reference.sample, first))


@settings(max_examples=20, deadline=None)
@given(
    vocab=st.integers(6, 70),
    channels=st.integers(1, 2),
    paired=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 4000),
    scale=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 45, 100]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    spread=st.sampled_from([0.0, 0.5, 5.0, 200.0]),
    ties=st.booleans(),
    first=st.booleans(),
)
def test_any_setting_equals_the_reference(
    vocab, channels, paired, seed, step, scale, temperature, top_k, top_p, spread, ties, first
) -> None:
    device = executor.device()
    logits = random((4 if paired else 2, channels, vocab), torch.float32, device, seed % 1000, spread)
    if ties:
        logits = logits.round()
    req = request(
        2, device, guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, step=step
    )
    eos = vocab - 4
    assert torch.equal(run(logits, req, eos, first=first), run(logits, req, eos, reference.sample, first))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.2, 0.3, 0.45, 0.6, 0.8, 1.0]),
    grid=st.sampled_from([0.0, 0.125, 1.0]),
)
def test_borders_let_the_same_ids_through_as_the_reference(seed, top_k, top_p, grid) -> None:
    """Few ids of almost the same weight and many draws: one id too many or too few would show. With ties, too."""
    device, batch = executor.device(), 24
    logits = random((1, 1, 40), torch.float32, device, seed, 2.0)
    if grid:
        logits = (logits / grid).round() * grid
    logits = logits.expand(batch, 1, 40).contiguous()
    req = request(batch, device, guidance_scale=1.0, temperature=50.0, top_k=top_k, top_p=top_p)
    req["seed"] = torch.arange(batch, device=device)
    assert torch.equal(run(logits, req, 36), run(logits, req, 36, reference.sample))


@pytest.mark.parametrize("digit", [1, 4, 8])
def test_bits_a_round_change_nothing(
    digit: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random((8, 2, 50), torch.float32, device, 2, 2.0)
    req = request(4, device, top_k=9, temperature=20.0, top_p=0.6)
    req["seed"] = torch.arange(4, device=device)
    expected = run(logits, req, 46)
    monkeypatch.setenv("DIA_KERNELS_TABLE", table(tmp_path, digit))
    assert torch.equal(run(logits, req, 46), expected)


def test_bits_a_round_divide_32(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_KERNELS_TABLE", table(tmp_path, 3))
    with pytest.raises(ValueError, match="DIGIT: 3 bits a round, needs 1, 2, 4 or 8"):
        run(torch.zeros(1, 1, 50, device=device), request(1, device), 46)


def test_eos_rule(device: torch.device) -> None:
    eos = 20
    logits = torch.zeros(2, 2, 24, device=device)
    logits[:, :, eos + 1 :] = 9.0
    logits[0, :, eos] = 5.0  # the argmax of what channel 0 may say
    logits[1, :, eos] = 5.0
    logits[1, :, 3] = 6.0
    req = request(2, device, guidance_scale=1.0, top_k=0, top_p=1.0, temperature=1.0)
    drawn = torch.stack([run(logits, {**req, "step": req["step"] + i}, eos) for i in range(12)])
    assert (drawn[:, 0, 0] == eos).all()
    assert (drawn[:, 1] < eos).all() and (drawn[:, 0, 1] < eos).all()
    assert drawn[:, 0, 1].unique().numel() > 3


def test_special_ids_take_their_places_among_the_guided_best(device: torch.device) -> None:
    """The best two guided ids are special ones: they fill top_k and leave one candidate, as in transformers."""
    logits = torch.zeros(2, 1, 12, device=device)
    logits[0, 0, [10, 11, 4, 5]] = torch.tensor([9.0, 8.0, 7.0, 6.0], device=device)
    req = request(1, device, top_k=3, top_p=1.0)
    drawn = {int(run(logits, {**req, "step": req["step"] + i}, 8)) for i in range(4)}
    assert drawn == {4}


OPS = pytest.mark.parametrize("op", [sample, reference.sample], ids=["triton", "torch"])
NOT_FINITE, EMPTY = 1, 2


def run_both(
    logits: torch.Tensor, req: dict[str, torch.Tensor], eos: int, op, first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and status."""
    out = poisoned((req["step"].shape[0], logits.shape[1]), torch.int32, logits.device)
    status = torch.zeros_like(out)
    op(logits=logits, **req, out=out, status=status, eos=eos, first_generation=first)
    return out, status


@OPS
def test_the_first_generation_samples_what_guidance_makes(op, device: torch.device) -> None:
    """Id 5 is the conditional best and, guided, behind 3; EOS, the guided best by less than a fifth, is damped away."""
    logits = torch.zeros(2, 2, 12, device=device)
    logits[0, :, 5], logits[1, :, 5] = 6.0, 5.9
    logits[0, :, 3], logits[1, :, 3] = 5.0, 2.0
    logits[0, :, 8], logits[1, :, 8] = 6.0, 3.7  # 12.9 when guided, 10.3 damped; id 3 has 14, and 6.3 id 5
    req = request(1, device, temperature=0.0, top_k=2)
    assert run(logits, req, 8, op, first=True).tolist() == [[3, 3]]
    logits[0, 0, 8] = 9.0  # 24.9, damped 19.9
    assert run(logits, req, 8, op, first=True).tolist() == [[8, 3]]
    logits[0, 0, 8] = 6.6  # 15.3 is the best, 12.2 is not
    assert run(logits, req, 8, op, first=True).tolist() == [[3, 3]]


@OPS
def test_nothing_left_gives_id_zero_and_is_told_where_it_is_drawn(op, device: torch.device) -> None:
    """Greedily, transformers takes id 0 as well; where it would draw it raises."""
    logits = torch.zeros(2, 1, 12, device=device)
    logits[0, 0, 10] = 9.0
    for temperature, expected in ((0.0, 0), (1.0, 5 * 4 + EMPTY)):
        out, status = run_both(logits, request(1, device, top_k=1, temperature=temperature), 8, op)
        assert out.item() == 0 and status.item() == expected


@OPS
def test_the_first_status_stays(op, device: torch.device) -> None:
    logits = torch.full((1, 1, 12), torch.nan, device=device)
    req = request(1, device, guidance_scale=1.0)
    out, status = run_both(logits, req, 8, op)
    assert status.item() == 5 * 4 + NOT_FINITE
    op(logits=logits, **req | {"step": req["step"] + 1}, out=out, status=status, eos=8)
    assert status.item() == 5 * 4 + NOT_FINITE
    req["step"][0], status[0] = -1, 0
    op(logits=logits, **req, out=out, status=status, eos=8)
    assert status.item() == 0, "of an inert batch row"


def bit_patterns() -> st.SearchStrategy[int]:
    """Of float32: any, and often infinities, NaN of either sign, zeros, the smallest and the largest numbers."""
    named = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0, 0x80000000, 1, 0x7F7FFFFF,
             0xFF7FFFFF, 0x3F800000]  # fmt: skip
    return st.one_of(st.sampled_from(named), st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    paired=st.booleans(),
    temperature=st.sampled_from([0.0, 1e-44, 1e-6, 1.0, 50.0]),
    top_k=st.sampled_from([0, 1, 3, 45]),
    top_p=st.sampled_from([1e-6, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 3.0]),
    first=st.booleans(),
)
def test_any_bits_of_logits_give_a_code_in_range(data, paired, temperature, top_k, top_p, scale, first) -> None:
    """On both backends the same code and status; and a status exactly where a score is NaN or plus infinity."""
    device, vocab, eos = executor.device(), 11, 7
    branches = 2 if paired else 1
    kinds = st.one_of(st.lists(bit_patterns(), min_size=2 * vocab, max_size=2 * vocab),
                      bit_patterns().map(lambda bits: [bits] * (2 * vocab)))  # fmt: skip
    bits = [data.draw(kinds) for _ in range(branches)]
    logits = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).view(branches, 2, vocab)
    logits = logits.to(device)
    req = request(1, device, temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=scale)
    out, status = run_both(logits, req, eos, sample, first)
    other, other_status = run_both(logits, req, eos, reference.sample, first)
    assert torch.equal(out, other) and torch.equal(status, other_status)
    assert (out >= 0).all() and (out[:, 0] <= eos).all() and (out[:, 1:] < eos).all()
    wrong = ~(logits[0] < torch.inf)
    if paired and scale != 1:
        wrong |= ~((logits[1] < torch.inf) & (logits[0] + scale * (logits[0] - logits[1]) < torch.inf))
    assert torch.equal(status[0] & 3 == NOT_FINITE, wrong.any(-1))
    assert not ((status & 3 == EMPTY) & (temperature == 0)).any()


def test_a_damaged_slot_changes_no_other(device: torch.device) -> None:
    logits = random((8, 2, 40), torch.float32, device, 5, 2.0)
    req = request(4, device)
    expected, _ = run_both(logits, req, 36, sample)
    logits[1, 0, 3], logits[6] = torch.nan, torch.inf
    out, status = run_both(logits, req, 36, sample)
    assert (status != 0).tolist() == [[False, False], [True, False], [True, True], [False, False]]
    assert torch.equal(out[[0, 3]], expected[[0, 3]])


def test_inert_slots_are_left_alone(device: torch.device) -> None:
    req = request(3, device)
    req["step"][1] = -1
    out = run(random((6, 2, 30), torch.float32, device), req, 26)
    assert_untouched(out[1])
    assert (out[[0, 2]] >= 0).all()


def test_a_slot_draws_the_same_whatever_its_company(device: torch.device) -> None:
    logits = random((12, 2, 40), torch.float32, device, 5, 2.0)
    req = request(6, device, top_k=0)
    req["seed"] = torch.arange(6, device=device)
    req["temperature"][2] = 0
    together = run(logits, req, 36)
    for batch_idx in range(6):
        alone = run(logits[[batch_idx, 6 + batch_idx]], {k: v[batch_idx : batch_idx + 1] for k, v in req.items()}, 36)
        assert torch.equal(alone[0], together[batch_idx])


@pytest.mark.parametrize("draws", [64, pytest.param(2000, marks=pytest.mark.slow)])
def test_never_outside_the_support(draws: int, device: torch.device) -> None:
    """Each draw from another key, all inside the candidates that the reference leaves."""
    logits = random((2, 2, 48), torch.float32, device, 6, 1.5)
    one = request(1, device, top_k=7, top_p=0.9)
    allowed = weights(logits, one, 44)[0] > 0
    assert (allowed.sum(-1) < 8).all()
    req = request(draws // 2, device, top_k=7, top_p=0.9)
    req["seed"] = torch.arange(draws // 2, device=device)
    drawn = run(logits.repeat_interleave(draws // 2, 0), req, 44).long()
    assert allowed.gather(1, drawn.T).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (12, 0.9)])
def test_frequencies_chi_square(top_k: int, top_p: float, device: torch.device) -> None:
    """Of 100,000 torch draws; the kernel's are equal to them (above), checked here on some once more."""
    logits = random((1, 1, 20), torch.float32, device, 8)
    req = request(100_000, device, guidance_scale=1.0, temperature=1.0, top_k=top_k, top_p=top_p)
    req["seed"] = torch.arange(100_000, device=device) * 7919
    wide = logits.expand(100_000, 1, 20)
    drawn = run(wide, req, 19, reference.sample)[:, 0].long()
    exact = weights(logits, {k: v[:1] for k, v in req.items()}, 19)[0, 0].double()
    counts = torch.bincount(drawn, minlength=20)
    assert not counts[exact == 0].any()
    live = exact > 0
    expected = exact[live] / exact.sum() * 100_000
    assert scipy.stats.chisquare(counts[live].cpu(), expected.cpu()).pvalue > 1e-3
    some = slice(0, 1000, 40)
    few = {k: v[some].contiguous() for k, v in req.items()}
    assert torch.equal(run(wide[some].contiguous(), few, 19)[:, 0].long(), drawn[some])


@triton.jit
def _philox_words(seed_ptr, c0_ptr, c1_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for i in tl.static_range(BLOCK):
        seed = tl.load(seed_ptr + i)
        c0, c1 = tl.load(c0_ptr + lane).to(tl.uint32), tl.load(c1_ptr + lane).to(tl.uint32)
        word, _1, _2, _3 = tl.philox(seed, c0, c1, c0 * 0, c0 * 0)
        tl.store(out_ptr + i * BLOCK + lane, word.to(tl.int64))


def test_philox_equals_the_torch_twin_bit_for_bit(device: torch.device) -> None:
    n = 16
    generator = torch.Generator().manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator).to(device)
    c0, c1 = (
        torch.randint(-(2**31), 2**31 - 1, (n,), generator=generator, dtype=torch.int32).to(device) for _ in range(2)
    )
    out = poisoned((n, n), torch.int64, device)
    _philox_words[(1,)](seed, c0, c1, out, BLOCK=n)
    assert torch.equal(out, reference.philox(seed[:, None].expand(n, n), c0.expand(n, n), c1.expand(n, n)))


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3, 2, 8), ValueError, "has 3 rows"),
        (torch.zeros(2, 2, 8, dtype=torch.float16), TypeError, "float32 needed"),
        (torch.zeros(2, 1, 20000), ValueError, "vocab 20000"),
        (torch.zeros(2, 8, 2).mT, ValueError, "logits: has strides"),
    ],
)
def test_wrong_logits_are_named(
    logits: torch.Tensor, error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        run(logits.to(device), request(2, device), 6)
