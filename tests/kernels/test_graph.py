"""A step is its launches: repeating them, and nothing else, serves every later step, which is all that a graph does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dia_fast.engine import Engine, Request, decode_graphs, generate
from dia_kernels import get_ops
from dia_kernels import launcher as launch
from tests.kernels.test_whole_model import model


class Recorder:
    """In place of a CUDA graph: notes the launches of a step, with their very arguments, and repeats them."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        launches: list[tuple[Any, ...]] = []

        def note(run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: Any) -> Any:
            launches.append((kernel, grid, args, meta))
            return run(kernel, grid, *args, **meta)

        with launch.listening(note):
            step()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for kernel, grid, args, meta in launches:
                launch.run(kernel, grid, *args, **meta)

        return replay


def requests() -> list[Request]:
    """Of different length, settings and guidance, one with a prompt."""
    prompt = torch.randint(0, 36, (5, 3), generator=torch.Generator().manual_seed(1))
    return [
        Request([1, 72, 105, 46], prompt, 5, temperature=1.3, top_k=12, seed=3),
        Request([2, 72], None, 3, guidance_scale=None, temperature=1.3, seed=4),
        Request([1, 72, 101, 108], None, 4, temperature=0.0, seed=5),
        Request([1] * 9, None, 2, temperature=2.0, top_p=0.9, seed=6),
    ]


def refuse(*args: Any) -> None:
    raise AssertionError("a step was made without its graph")


def test_replaying_the_launches_of_one_step_serves_all_others(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three requests in the buffers for three: the rows of the missing ones are padding."""
    made = model(get_ops("triton", device), device)
    recorder = Recorder()
    monkeypatch.setattr(decode_graphs, "BUCKETS", (3,))
    engine = Engine(made, max_batch=3, capture=recorder)
    asked = requests()
    assert recorder.captures == 0, "nothing is captured before it is needed"
    for request in asked[:2]:  # the first step of each kind is made without a graph, the second one captures it
        engine.submit(request).result()
    assert recorder.captures == 2  # with and without guidance
    before = engine.steps - recorder.replays
    assert before == 2
    handles = [engine.submit(request) for request in asked[:3]]
    monkeypatch.setattr(made, "decode_step", refuse)
    while not handles[1].done:
        engine.step()
    handles.append(engine.submit(asked[3]))
    while engine.step():
        pass
    assert recorder.replays == engine.stats.steps - before > 5
    expected = generate(model(get_ops("torch"), device), asked)
    for handle, theirs in zip(handles, expected, strict=True):
        assert torch.equal(handle.result().delayed_codes, theirs.delayed_codes)


def test_a_capture_that_fails_says_why_and_leaves_the_engine_working(device: torch.device) -> None:
    def fails(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    made = model(get_ops("triton", device), device)
    engine = Engine(made, max_batch=1, capture=fails)
    request = requests()[3]
    [expected] = generate(model(get_ops("torch"), device), [request])
    handle = engine.submit(request)
    with pytest.warns(RuntimeWarning, match="could not be captured as a graph .*not permitted.*launch by launch"):
        found = handle.result()
    assert torch.equal(found.delayed_codes, expected.delayed_codes)
