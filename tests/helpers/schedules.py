"""Helpers for tests of the engine: a model small enough for thousands of steps, and requests told by a number."""

from collections import Counter
from functools import lru_cache
from typing import Any

import torch

from bench.tools.tiny_models import tiny_config
from dia_fast.engine import Engine, Generation, Request, generate
from dia_fast.engine.sequence import State
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.kv_cache import MOST_KEPT, NO_TABLE_ROW, PAGE_SIZE, BlockTable
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops

CHANNELS, EOS = 3, 36
POSITIONS = 140


def small_config() -> DiaConfig:
    """One layer with shared heads, three channels and a short delay."""
    decoder = {"num_channels": CHANNELS, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32}
    codes = {"eos_token_id": EOS, "pad_token_id": 37, "bos_token_id": 38, "max_position_embeddings": POSITIONS}
    return tiny_config({"num_hidden_layers": 1}, decoder | codes | {"num_hidden_layers": 1}, delay_pattern=(0, 2, 3))


@lru_cache
def small_model(dtype: torch.dtype = torch.float32, eos: float = 1.5) -> DiaModel:
    """Random weights; EOS comes up now and then, the more often the larger `eos` is."""
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in fused_shapes(small_config()).items():
        values = torch.randn(shape, generator=generator)
        scale = 1.0 if "embedding" in name else 0.7 * shape[-1] ** -0.5
        weights[name] = (values * scale if len(shape) == 2 else 1 + 0.1 * values).to(dtype)
    weights["decoder.head"][EOS] *= eos
    return DiaModel(small_config(), get_ops("torch")).load(weights)


def numbered_request(number: int, longest: int = 60, **settings: Any) -> Request:
    """The `number`th of a fixed list of requests of every kind."""
    generator = torch.Generator().manual_seed(number)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    text = torch.randint(1, 256, (pick(1, 5, 31, 32, 33, 70),), generator=generator).tolist()
    frames = pick(0, 0, 1, 31, 32, 40)
    prompt = torch.randint(0, EOS, (frames, CHANNELS), generator=generator) if frames else None
    chosen = {
        "max_new_tokens": pick(1, 4, 20, 33, longest),
        "guidance_scale": pick(3.0, 3.0, 1.5, None),
        "temperature": pick(1.2, 1.2, 0.0, 2.0),
        "top_k": pick(45, 5, None),
        "top_p": pick(0.95, 1.0, 0.5),
        "seed": number,
    }
    guided = pick(None, None, 1, 7, 30)
    chosen |= settings
    if chosen["guidance_scale"] is not None:
        chosen.setdefault("guidance_steps", guided)
    return Request(text, prompt, **chosen)


@lru_cache
def alone(number: int, longest: int = 60, dtype: torch.dtype = torch.float32) -> Generation:
    """The result of a numbered request by itself."""
    return generate(small_model(dtype), [numbered_request(number, longest)])[0]


def assert_same(ours: Generation, other: Generation) -> None:
    assert torch.equal(ours.delayed_codes, other.delayed_codes)
    assert torch.equal(ours.frames, other.frames)
    assert (ours.seed, ours.truncated) == (other.seed, other.truncated)


def run_to_end(engine: Engine, most: int = 10_000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError(f"the engine still has work after {most} steps: {engine.stats}")


def assert_pages_sound(blocks: BlockTable) -> None:
    """Every page is held as often as rows list it, or free, or free and kept under one key."""
    pool = blocks.pool
    held = Counter(page for table_row in range(blocks.table_rows) for page in blocks.held_pages(table_row))
    assert {page: pool.holders(page) for page in range(pool.pages)} == {page: held[page] for page in range(pool.pages)}
    free = [*pool._free, *pool._free_kept]
    assert len(free) == len(set(free)) == pool.free == pool.pages - len(held) and not held.keys() & set(free)
    assert all(0 <= page < pool.pages for page in [*held, *free])
    kept = [page for pages in pool._kept.values() for page in pages]
    assert len(kept) == len(set(kept)) and set(kept) == pool._key_of.keys() and len(pool._kept) <= MOST_KEPT
    assert set(pool._free_kept) <= set(kept) and not set(pool._free) & set(kept)


def assert_sound(engine: Engine) -> None:
    """No page is lost or belongs to two requests, batch rows in use show their own pages, the others are inert.

    Only full pages of the unconditional half of one prompt are shared.
    """
    state, runs = engine.state, engine._running
    for blocks in (state.blocks, state.cross_blocks):
        assert_pages_sound(blocks)
    prompts: dict[int, tuple[int, bytes]] = {}
    for sequence in [*runs, *filter(None, [engine._newcomer])]:
        for table_row in state.table_rows(sequence.table_idx, state.guided):
            for index, page in enumerate(state.blocks.held_pages(table_row)):
                if state.pool.holders(page) > 1:
                    assert table_row != sequence.table_idx and (index + 1) * PAGE_SIZE <= sequence.plan.first
                    ours = (index, sequence.plan.prompt_bytes)
                    assert prompts.setdefault(page, ours) == ours
    table_idxs = [run.table_idx for run in [*runs, *engine._swapped, *filter(None, [engine._newcomer])]]
    assert len(table_idxs) == len(set(table_idxs)) and NO_TABLE_ROW not in table_idxs
    assert sorted(table_idxs + engine._free_table_idxs) == list(range(state.capacity))
    for numbers, state_of in (
        (runs, State.RUNNING),
        (engine._swapped, State.SWAPPED),
        (engine._waiting, State.WAITING),
    ):
        assert all(sequence.state is state_of for sequence in numbers)
    assert (state.step[len(runs) :] == -1).all()
    for batch_idx, run in enumerate(runs):
        assert int(state.seed[batch_idx]) == run.plan.seed
        assert state.blocks.held(run.table_idx) * state.pool.shape.page_size >= min(engine._step_of(run), run.plan.end)
    for idle in set(range(state.capacity)) - set(table_idxs):
        assert not any(state.blocks.held(table_row) for table_row in state.table_rows(idle, state.guided))
        assert not state.cross_blocks.held(idle)
