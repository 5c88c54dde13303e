"""A model that costs next to nothing, for tests of the engine that make many thousands of steps.

It speaks by a checksum: of what lies in the pages of its text and of all its steps, and of the seed. So codes change
when a page is lost, shared, or swapped back to another place, as they do with a real model.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dia_fast.engine import Engine, Generation, Request
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.kv_cache import PAGE_SIZE, PagePool
from dia_kernels import get_ops
from dia_kernels.reference.sampling import NOT_FINITE
from tests.helpers.schedules import CHANNELS, EOS, small_config

BAD = 666
_PRIME = 8191  # sums below it times the longest delayed codes are exact in fp32


class CheapModel:
    """All that an engine asks of a `DiaModel`.

    ends: whether speech ends by itself now and then. A request of seed `BAD` has logits that are not finite.
    """

    dtype, device, revision = torch.float32, torch.device("cpu"), 0

    def __init__(self, *, ends: bool = True) -> None:
        self.config: DiaConfig = small_config()
        self.ops, self.ends = get_ops("torch"), ends

    def store_text(self, ids: Tensor, pool: PagePool, slot_mapping: Tensor) -> None:
        pool.keys[0][slot_mapping // PAGE_SIZE, 0, slot_mapping % PAGE_SIZE, 0] = ids.float()

    def prefill(
        self, codes: Tensor, s: DecodeState, table_idx: int, text_length: int | None, *, first: int = 0
    ) -> None:
        values = torch.tensor([_checksum(row) for row in codes.numpy()], dtype=torch.float32)
        branch = int(text_length is None)
        table_row = s.unconditional(table_idx) if branch else table_idx
        slot_mapping = s.blocks.slot_mapping(table_row, first + len(codes), first)
        s.pool.keys[0][slot_mapping // PAGE_SIZE, 0, slot_mapping % PAGE_SIZE, 0] = values + branch

    def decode_step(self, s: DecodeState) -> None:
        step, finished = s.step.numpy(), s.finished.numpy()
        for batch_idx in range(s.batch):
            if step[batch_idx] >= 0 and not finished[batch_idx]:
                self._request(s, batch_idx, int(step[batch_idx]))

    def _request(self, s: DecodeState, batch_idx: int, at: int) -> None:
        depth, pattern = at - int(s.first_step[batch_idx]), np.asarray(self.config.delay_pattern)
        code = s.sampled.numpy()[batch_idx].copy()
        if 0 <= depth < s.prompt_codes.shape[1]:
            given = s.prompt_codes.numpy()[batch_idx, depth]
            code = np.where(given >= 0, given, code)
        eos_step, end_step = s.eos_step.numpy(), int(s.end_step[batch_idx])
        if eos_step[batch_idx] < 0 and depth > 0:
            if at == end_step - pattern.max():
                code[0] = EOS
            if code[0] == EOS:
                eos_step[batch_idx] = at
        if eos_step[batch_idx] >= 0:
            past = at - eos_step[batch_idx] - pattern
            code = np.where(past == 0, EOS, np.where(past > 0, self.config.decoder.pad_token_id, code))
        s.codes.numpy()[batch_idx, at] = code
        if at >= end_step or (eos_step[batch_idx] >= 0 and at >= eos_step[batch_idx] + pattern.max()):
            s.finished.numpy()[batch_idx] = 1
        s.step.numpy()[batch_idx] = at + 1
        text = _read(s.cross_pool, s.cross_table[batch_idx], int(s.text_lengths[batch_idx]))
        total = int(s.seed[batch_idx]) * 31 + text * 17
        for branch in range(2 if s.guided else 1):
            table, offset = s.table[branch * s.batch + batch_idx], at % PAGE_SIZE
            s.pool.keys[0].numpy()[int(table[at // PAGE_SIZE]), 0, offset, 0] = _checksum(code) + branch
            if branch == 0 or float(s.guidance_scale[batch_idx]) != 1.0:
                total += (branch + 1) * _read(s.pool, table, at + 1)
        if int(s.seed[batch_idx]) == BAD:
            s.status.numpy()[batch_idx, 1] = (at + 1) << 2 | NOT_FINITE
        drawn = (total + np.arange(CHANNELS) * 7) % EOS
        if self.ends and total % 41 == 0:
            drawn[0] = EOS
        s.sampled.numpy()[batch_idx] = drawn


def _checksum(code: NDArray[np.int32]) -> int:
    return int((np.asarray(code, np.int64) * [3, 50, 701]).sum()) % _PRIME


def _read(pool: PagePool, table: Tensor, count: int) -> int:
    """A checksum of `count` tokens that depends on their order."""
    pages = table.numpy()[: -(-count // PAGE_SIZE)]
    values = pool.keys[0].numpy()[pages, 0, :, 0].reshape(-1)[:count].astype(np.int64)
    return int((values * (np.arange(count) % 11 + 1)).sum()) % _PRIME


@lru_cache(maxsize=1024)
def _alone(key: tuple[object, ...]) -> Generation:
    ids, prompt, most, guidance, guided, seed, ends = key
    codes = None if prompt is None else torch.tensor(prompt, dtype=torch.int64)
    given = {"guidance_scale": guidance, "guidance_steps": guided, "seed": seed}
    request = Request(list(ids), codes, most, **given)  # type: ignore[arg-type, call-overload]
    engine = Engine(CheapModel(ends=bool(ends)), max_batch=1)  # type: ignore[arg-type]
    return engine.submit(request).result()


def alone_cheaply(request: Request, *, ends: bool = True) -> Generation:
    """The result of a request by itself."""
    prompt = None if request.prompt is None else tuple(map(tuple, request.prompt.tolist()))
    guidance = (request.guidance_scale, request.guidance_steps)
    return _alone((tuple(request.text_ids), prompt, request.max_new_tokens, *guidance, request.seed, ends))
