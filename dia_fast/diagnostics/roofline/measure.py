"""The launches of a prediction, timed on a GPU: one by one, and as whole steps of the engine.

A launch is timed over the layers of the model, one after another in a CUDA graph: each layer has weights of its own, so
the cache is of no more help than in a step. The time includes the gap to the next launch. Launches that a step makes
once follow every few down projections, which fill the cache and whose time is taken off again.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dia_fast.checkpoint.loading import Checkpoint
from dia_fast.diagnostics.roofline.predict import Workload
from dia_fast.diagnostics.roofline.work import LAUNCHES
from dia_fast.engine import Engine, Request
from dia_fast.engine.decode_graphs import CudaGraphs
from dia_fast.errors import InputError
from dia_fast.model.decode_state import DecodeState, Sizes, cross_pages, self_pages
from dia_fast.model.device import choose_ops
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import rounded
from dia_kernels import launcher as launch
from dia_kernels.reference.quantized import Int8Weight

ROUNDS = 9  # of which the median counts
STEPS = 4  # of the engine, per round
FLUSH = 8  # down projections, 268 MB in bf16: more than any cache holds
Work = Callable[[], None]


class Timer(Protocol):
    """All that measuring needs of a device. name: as its driver says; device: where tensors go."""

    name: str
    device: torch.device

    def capture(self, work: Work) -> Work:
        """Return a function that repeats the launches of `work`, without the host's time between them."""

    def seconds(self, work: Work) -> float:
        """Time on the device from the start of `work` to its end.

        It is called twice and timed the second time: the device must not wait for the host.
        """


class GpuTimer:
    """CUDA events, and CUDA graphs. device: a GPU, the current one where it has no number."""

    def __init__(self, device: torch.device) -> None:
        # torch can make only a numbered device the current one, and events and graphs are those of the current one.
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.device)
        torch.cuda.set_device(self.device)
        self.capture = CudaGraphs()

    def seconds(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def gpu_timer(device: str | None = None) -> Timer:
    """For a GPU of this machine, the first by default. Raises InputError, saying what is missing, if there is none."""
    from dia_fast.model.device import choose_device
    from dia_kernels.ops import triton_obstacle

    if not torch.cuda.is_available():
        raise InputError(
            f"--measure needs a GPU that torch can use, and torch {torch.__version__} sees none on this machine; "
            "without --measure, `dia-fast plan` predicts for GPUs that are not here"
        )
    chosen = choose_device(device or "cuda")
    if chosen.type != "cuda":
        raise InputError(f"--measure: --device {device} is no GPU; use cuda, cuda:1 and so on")
    obstacle = triton_obstacle(chosen)
    if obstacle is not None or launch.architecture(chosen) == "interpreter":
        raise InputError(
            f"--measure: the kernels cannot run on {device or 'cuda'}: {obstacle or 'TRITON_INTERPRET is set'}"
        )
    return GpuTimer(chosen)


@torch.inference_mode()
def measure(
    workload: Workload, timer: Timer, checkpoint: Checkpoint | None = None, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Seconds of every launch by name and of a step of the engine.

    checkpoint: of the workload's config; None for random weights, which take as long. Raises DiaFastError.
    """
    dtype: torch.dtype = getattr(torch, workload.dtype)
    ready = _model(workload, dtype, timer.device, checkpoint)
    launches = _launches(ready, workload, timer, rounds)
    seconds, contexts = _steps(ready, workload, timer, rounds)
    return {
        "device": timer.name,
        "weights": "random" if checkpoint is None else checkpoint.source,
        "rounds": rounds,
        "launches": launches,
        "step_seconds": seconds,
        "step_contexts": contexts,
    }


def _model(workload: Workload, dtype: torch.dtype, device: torch.device, checkpoint: Checkpoint | None) -> DiaModel:
    """The code that ends a sentence never wins, so that no request ends while it is timed."""
    config = workload.config
    if checkpoint is None:
        generator = torch.Generator(device).manual_seed(0)
        plain = {}
        for name, shape in fused_shapes(config).items():
            weight = torch.ones(shape, dtype=dtype, device=device)
            if len(shape) > 1:
                weight.normal_(0, shape[-1] ** -0.5, generator=generator)
            plain[name] = weight
        weights = rounded(plain, config, workload.weights)
    else:
        weights = checkpoint.load_as(workload.weights, dtype, device)
    head = weights["decoder.head"]
    (head.values if isinstance(head, Int8Weight) else cast(Tensor, head))[config.decoder.eos_token_id] = 0
    return DiaModel(config, choose_ops("triton", device)).load(weights)


def _launches(model: DiaModel, workload: Workload, timer: Timer, rounds: int) -> dict[str, float]:
    state = _state(model, workload)
    calls: list[Work] = []

    def keep(run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        calls.append(partial(launch.run, kernel, grid, *args, **meta))
        run(kernel, grid, *args, **meta)

    with launch.listening(keep):
        model.decode_step(state)
    layers = workload.config.decoder.num_hidden_layers
    named = {name: calls[1 + at : -2 : 8] for at, name in enumerate(LAUNCHES[1:-2])}
    once = {"embed": calls[0], "heads": calls[-2], "sample": calls[-1]}

    def timed(works: list[Work]) -> float:
        def all_of_them() -> None:
            for work in works:
                work()

        _reset(state, workload)
        replay = timer.capture(all_of_them)
        return median(timer.seconds(replay) for _ in range(rounds))

    found = {name: timed(works) / layers for name, works in named.items()}
    for name, work in once.items():
        mixed: list[Work] = []
        for first in range(0, layers, FLUSH):
            mixed += [*named["down"][first : first + FLUSH], work]
        added = timed(mixed) - found["down"] * layers
        found[name] = max(added, 0.0) / -(-layers // FLUSH)
    return {name: found[name] for name in LAUNCHES}


def _state(model: DiaModel, workload: Workload) -> DecodeState:
    """Buffers as in an engine for any request, with every request at its context and its pages filled."""
    config, step = model.config, workload.step
    own, cross = self_pages(config), cross_pages(config)
    steps = workload.context + 1
    sizes = Sizes(
        step.padded, step.guided, step.capacity, step.text_capacity,
        workload.requests * step.branches * own.pages(steps), workload.requests * cross.pages(workload.text),
    )  # fmt: skip
    state = DecodeState(config, model.ops, sizes, model.dtype, model.device)
    for batch_idx in range(workload.requests):
        state.grow(batch_idx, steps)
        state.cross_blocks.grow(batch_idx, workload.text)
    for pages in state.pool.keys + state.pool.values + state.cross_pool.keys + state.cross_pool.values:
        pages.normal_()
    _reset(state, workload)
    return state


def _reset(state: DecodeState, workload: Workload) -> None:
    """Put every request back at its context: the launches that are timed move on what they find."""
    used = workload.requests
    state.step.fill_(-1)
    state.step[:used] = workload.context - 1
    state.positions.fill_(-1)
    for first in range(0, state.rows, state.batch):
        state.positions[first : first + used] = workload.context - 1
    state.eos_step.fill_(-1)
    state.first_step.fill_(-1000)  # nothing is prescribed any more
    state.end_step.fill_(1 << 30)
    state.finished.zero_()
    state.text_lengths[:used] = workload.text
    state.sampled.zero_()
    state.guidance_scale.fill_(3.0)
    state.temperature.fill_(1.2)
    state.top_k.fill_(45)
    state.top_p.fill_(0.95)
    state.x.normal_()


def _steps(model: DiaModel, workload: Workload, timer: Timer, rounds: int) -> tuple[float, list[int]]:
    """Seconds of a step of the engine, and the contexts that were met."""
    config, decoder = model.config, model.config.decoder
    total = 2 * STEPS * (rounds + 1)  # every timed call is made twice, and the first round does not count
    if decoder.max_position_embeddings < total + 2:
        raise InputError(
            f"--measure: {total} steps are timed, and this model ends after {decoder.max_position_embeddings}"
        )
    first = max(min(workload.context - total // 2, decoder.max_position_embeddings - total - 2), 0)
    frames = torch.randint(0, decoder.eos_token_id, (first, decoder.num_channels), dtype=torch.int64, device="cpu")
    text = torch.randint(1, config.encoder.vocab_size, (workload.text,), dtype=torch.int64, device="cpu").tolist()
    request = Request(
        text,
        frames if first else None,
        decoder.max_position_embeddings - first,
        3.0 if workload.guided else 1.0,
        seed=0,
    )
    own, cross, step = self_pages(config), cross_pages(config), workload.step
    held = own.pages(first + total + 2) + 1  # a newcomer needs a page to spare for each row that runs
    sizes = Sizes(
        step.padded, step.guided, step.capacity, step.text_capacity,
        workload.requests * step.branches * held, workload.requests * cross.pages(workload.text),
    )  # fmt: skip
    capture = timer.capture if workload.graph else None
    with Engine(model, sizes=sizes, prefill_tokens=1 << 30, capture=capture) as engine:
        handles = [engine.submit(request) for _ in range(workload.requests)]
        while engine.stats.running < workload.requests and not any(handle.error for handle in handles):
            engine.step()
        begin = engine.steps

        def some() -> None:
            for _ in range(STEPS):
                engine.step()

        spans = [timer.seconds(some) / STEPS for _ in range(rounds + 1)][1:]
        for handle in handles:
            if handle.error is not None:
                raise handle.error
        return median(spans), [first + begin, first + engine.steps]
