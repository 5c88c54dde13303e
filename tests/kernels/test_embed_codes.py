"""embed_codes against the torch reference: every state tensor and the embedding, over whole generations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_kernels import reference
from dia_kernels.triton.embed_codes import embed_codes
from tests.kernels import executor
from tests.kernels.support import DTYPES, assert_within_budget, poisoned, random

EOS, PAD, BOS = 24, 25, 26
VOCAB = 28


def make_state(
    batch: int, delay: list[int], hidden: int, paired: bool, dtype: torch.dtype, seed: int, device: torch.device
) -> dict:
    generator = torch.Generator().manual_seed(seed)
    channels, depth = len(delay), max(delay) + 1

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(device)

    first_step = integers(0, 5, batch)
    end_step = first_step + integers(1, max(delay) + 12, batch)
    rows = batch * (2 if paired else 1)
    return {
        "sampled": integers(0, EOS, batch, channels),
        "prompt_codes": integers(-4, EOS, batch, depth, channels).clamp(min=-1),
        "step": first_step.clone(),
        "first_step": first_step,
        "end_step": end_step,
        "eos_step": torch.full((batch,), -1, dtype=torch.int32, device=device),
        "delay": torch.tensor(delay, dtype=torch.int32, device=device),
        "table": random((channels * VOCAB, hidden), dtype, device, seed),
        "codes": poisoned((batch, int(end_step.max()) + 1, channels), torch.int32, device),
        "positions": poisoned((rows,), torch.int32, device),
        "finished": torch.zeros(batch, dtype=torch.int32, device=device),
        "x": poisoned((rows, hidden), dtype, device),
    }


def run_both(state: dict, steps: int, eos_at: dict[int, int]) -> None:
    """Steps kernel and reference side by side on the same sampled codes and compares everything after each step."""
    mine, theirs = ({k: v.clone() for k, v in state.items()} for _ in range(2))
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        sampled = torch.randint(0, EOS, state["sampled"].shape, generator=generator, dtype=torch.int32).to(
            state["step"].device
        )
        for batch_idx, at in eos_at.items():
            if at == step:
                sampled[batch_idx % sampled.shape[0], 0] = EOS
        for each, op in ((mine, embed_codes), (theirs, reference.embed_codes)):
            each["sampled"].copy_(sampled)
            each["x"].fill_(float("nan"))
            op(**each, eos=EOS, pad=PAD)
        for name in state:
            assert torch.equal(mine[name], theirs[name]), f"{name} differs at step {step}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paired", [False, True])
def test_a_generation_to_its_end(dtype: torch.dtype, paired: bool, device: torch.device) -> None:
    state = make_state(3, [0, 2, 3], 48, paired, dtype, 1, device)
    run_both(state, 16, {0: 6, 1: 2})


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 5),
    delay=st.lists(st.integers(0, 6), min_size=1, max_size=8).map(lambda tail: [0, *tail]),
    hidden=st.sampled_from([16, 48, 80]),
    paired=st.booleans(),
    seed=st.integers(0, 1000),
    eos_at=st.dictionaries(st.integers(0, 4), st.integers(0, 8), max_size=3),
)
def test_any_delay_and_any_eos(
    batch: int, delay: list[int], hidden: int, paired: bool, seed: int, eos_at: dict[int, int]
) -> None:
    run_both(make_state(batch, delay, hidden, paired, torch.float32, seed, executor.device()), 6, eos_at)


def test_inert_slots_are_left_alone(device: torch.device) -> None:
    state = make_state(3, [0, 1], 16, True, torch.float32, 2, device)
    state["step"][0] = -1
    state["finished"][1] = 1
    before = {k: v.clone() for k, v in state.items()}
    embed_codes(**state, eos=EOS, pad=PAD)
    for name in ("step", "eos_step", "finished", "codes"):
        assert torch.equal(state[name][:2], before[name][:2]), name
    assert state["positions"].tolist() == [-1, -1, int(before["step"][2])] * 2
    assert not state["x"].view(2, 3, -1)[:, :2].any()
    assert state["x"].view(2, 3, -1)[:, 2].any()


def test_production_width_sums_in_fp32(device: torch.device) -> None:
    delay = [0, 8, 9, 10, 11, 12, 13, 14, 15]
    state = make_state(2, delay, 2048, True, torch.bfloat16, 3, device)
    embed_codes(**state, eos=EOS, pad=PAD)
    at = state["step"].long() - 1
    codes = state["codes"][torch.arange(2, device=device), at].long()
    entries = state["table"][codes + torch.arange(9, device=device) * VOCAB]
    plain = entries.sum(1).repeat(2, 1)
    assert_within_budget(state["x"], plain, entries.double().sum(1).repeat(2, 1))


def test_wrong_row_count_is_named(device: torch.device) -> None:
    state = make_state(3, [0, 1], 16, True, torch.float32, 2, device)
    state["x"] = state["x"][:4]
    with pytest.raises(ValueError, match="x: has 4 rows, needs 3"):
        embed_codes(**state, eos=EOS, pad=PAD)


@pytest.mark.parametrize("op", [embed_codes, reference.embed_codes], ids=["triton", "torch"])
@pytest.mark.parametrize("code", [VOCAB, 2**31 - 1, -5, -(2**31)])
def test_a_code_outside_the_table_reads_its_nearest_end(op, code: int, device: torch.device) -> None:
    state = make_state(1, [0, 1], 16, False, torch.float32, 2, device)
    state["prompt_codes"].fill_(-1)
    state["step"].copy_(state["first_step"])
    state["sampled"].fill_(code)
    op(**state, eos=EOS, pad=PAD)
    end = min(max(code, 0), VOCAB - 1)
    assert torch.equal(state["x"][0], state["table"][end] + state["table"][VOCAB + end])
    assert (state["codes"][0, int(state["first_step"])] == end).all()
