"""The host's lead over a device, in the milliseconds of a virtual one: steps, results, chunks, pages."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from dia_fast.engine import Engine, Generation, Handle, Request, generate, scheduler
from dia_fast.model.decode_state import Sizes
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops
from tests.helpers.schedules import CHANNELS, EOS, assert_same, small_config, small_model
from tests.helpers.virtual_device import HOST, VirtualDevice

LONG = 520  # positions
LATE = 5e-3  # seconds


@lru_cache
def long_model(eos: float) -> DiaModel:
    """As `small_model`, with positions for some hundred rows. Speech ends the sooner the larger `eos` is."""
    config = small_config()
    config = replace(config, decoder=replace(config.decoder, max_position_embeddings=LONG))
    weights = {name: tensor.clone() for name, tensor in small_model(eos=0.0).state_dict().items()}
    weights["decoder.head"][EOS] = small_model(eos=1.0).decoder.head[EOS] * eos
    assert set(weights) == set(fused_shapes(config))
    return DiaModel(config, get_ops("torch")).load(weights)


def requests(count: int, rows: int) -> list[Request]:
    """They end by their limits, at rows around `rows`; every third without guidance."""
    return [
        Request([5, index + 1], None, rows - index % 7, guidance_scale=None if index % 3 == 2 else 3.0, seed=index)
        for index in range(count)
    ]


def sizes(count: int, rows: int) -> Sizes:
    """Exactly what the requests can fill."""
    pages = sum(2 * (-(-rows // 32)) for _ in range(count))
    return Sizes(count, True, LONG + 1, 32, pages, count)


@lru_cache
def expected(count: int, rows: int) -> list[Generation]:
    return generate(long_model(0.0), requests(count, rows))


def drive(engine: Engine, handles: list[Handle], device: VirtualDevice) -> dict[int, float]:
    """To the end; by index, when the host had each result."""
    seen: dict[int, float] = {}
    for _ in range(100_000):
        busy = engine.step()
        for index, handle in enumerate(handles):
            if handle.done and index not in seen:
                seen[index] = device.clock
        if not busy:
            return seen
        if len(device.launches) > 3000:
            return seen
    raise AssertionError("no end")


@pytest.mark.parametrize("step", [1e-3, 0.5e-3])
@pytest.mark.parametrize(("count", "rows"), [(1, 400), (3, 416), (32, 60)])
def test_no_more_than_four_steps_too_many_and_results_are_there_at_once(count: int, rows: int, step: float) -> None:
    device = VirtualDevice(step)
    engine = Engine(long_model(0.0), sizes=sizes(count, rows + 1), device=device)
    handles = [engine.submit(request) for request in requests(count, rows)]
    seen = drive(engine, handles, device)
    needed = rows + 1
    assert device.in_flight <= 2
    assert needed <= engine.steps <= needed + 4
    for index, (handle, want) in enumerate(zip(handles, expected(count, rows), strict=True)):
        assert_same(handle.result(), want)
        due = device.launches[len(want.delayed_codes) - 1]
        assert due <= seen[index] <= due + LATE
    assert not device.outside


def test_without_the_bound_it_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above are red then: steps pile up, and so do reports that nobody can read yet."""
    monkeypatch.setattr(scheduler, "RUN_AHEAD", 1 << 30)
    device = VirtualDevice(1e-3)
    engine = Engine(long_model(0.0), sizes=sizes(1, 101), device=device)
    drive(engine, [engine.submit(requests(1, 100)[0])], device)
    assert device.in_flight > 2


@pytest.mark.parametrize("step", [1e-3, 0.5e-3])
def test_frames_of_streams_come_when_they_are_due(step: float) -> None:
    device = VirtualDevice(step)
    engine = Engine(long_model(0.0), sizes=sizes(4, 200), device=device)
    handles = [engine.submit(request) for request in requests(4, 150)]
    late: list[float] = []
    known = [0] * 4
    while engine.step():
        for index, handle in enumerate(handles):
            there = len(handle.delayed_codes())
            # Row r is made by step r, all having begun with the first one.
            late += [device.clock - device.launches[row] for row in range(known[index], there) if row >= 0]
            known[index] = there
    assert len(late) > 500
    assert min(late) >= 0 and max(late) <= LATE


@pytest.mark.parametrize("rows", [416, 450, 512])
@pytest.mark.parametrize("guided", [True, False])
def test_nothing_that_has_finished_fails_for_lack_of_pages(rows: int, guided: bool) -> None:
    """The cache holds the request to its last row, and not one page more."""
    device = VirtualDevice(0.5e-3)
    pages = (2 if guided else 1) * (-(-rows // 32))
    engine = Engine(long_model(0.0), sizes=Sizes(1, guided, LONG + 1, 32, pages, 1), device=device)
    request = Request([5], None, rows - 1, guidance_scale=3.0 if guided else None, seed=1)
    handle = engine.submit(request)
    drive(engine, [handle], device)
    assert len(handle.result().delayed_codes) == rows


def test_speech_that_ends_by_itself_is_noticed_at_once_and_frees_its_pages_for_others() -> None:
    """Nobody is swapped out for a sequence that has ended without the host knowing."""
    device = VirtualDevice(0.5e-3)
    model = small_model()
    together = [Request([5, index], None, 130, seed=index) for index in range(8)]
    expected = generate(model, together)
    engine = Engine(model, sizes=Sizes(8, True, 141, 32, 40, 8), device=device)
    handles = [engine.submit(request) for request in together]
    while engine.step():
        pass
    assert len({len(item.delayed_codes) for item in expected}) > 3
    for handle, want in zip(handles, expected, strict=True):
        assert_same(handle.result(), want)


def test_the_device_sees_a_newcomer_in_one_upload() -> None:
    device = VirtualDevice(1e-3)
    engine = Engine(small_model(eos=0.0), max_batch=4, device=device)
    prompt = torch.zeros(135, CHANNELS, dtype=torch.int64)
    for count, given in enumerate((None, prompt, prompt), 1):
        handle = engine.submit(Request([1] * 60, given, 4, guidance_scale=None if count == 3 else 3.0, seed=0))
        while not handle.done:
            engine.step()
        assert device.uploads == count


def test_an_idle_host_costs_the_device_nothing() -> None:
    """The device is never without work while there is some: host and device overlap."""
    device = VirtualDevice(1e-3)
    engine = Engine(long_model(0.0), sizes=sizes(1, 301), device=device)
    drive(engine, [engine.submit(requests(1, 300)[0])], device)
    assert device.launches[299] - device.launches[0] <= 299 * (1e-3 + 30e-6) and HOST < 1e-3
