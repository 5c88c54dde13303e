"""A decode step of the whole model in the middle of its work, captured as a graph: what tuning and ablation time."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch

from bench.device import Device
from dia_fast.diagnostics.launches import CONTEXT
from dia_fast.engine.decode_graphs import Capture
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, rounded

MAX_TEXT = 1024
WARM_UP, SPANS = 10, 7  # replays before the first span, and how many are timed


@dataclass(frozen=True)
class Load:
    """Work of a step.

    rows: 1 without guidance, else twice the requests; context: tokens of each row so far; text: bytes of each text.
    """

    rows: int
    context: int
    text: int

    @property
    def batch(self) -> int:
        return max(self.rows // 2, 1)


def random_model(
    dtype: torch.dtype,
    device: torch.device,
    ops: ModuleType,
    layers: int | None = None,
    weights: str = FLOAT,
    config: DiaConfig | None = None,
) -> DiaModel:
    """Dia-1.6B, or a model of another config, with random weights that keep the scale; no sentence ends.

    layers: of the decoder (all 18). The encoder, which no step calls, has one. weights: of `quantization.WEIGHTS`.
    """
    config = config or DiaConfig()
    config = replace(
        config,
        encoder=replace(config.encoder, num_hidden_layers=1),
        decoder=replace(config.decoder, num_hidden_layers=layers or config.decoder.num_hidden_layers),
    )
    generator = torch.Generator(device).manual_seed(0)
    fused = {}
    for name, shape in fused_shapes(config).items():
        values = torch.randn(shape, generator=generator, device=device)
        values = 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5
        if name.endswith(("qkv", "cross_q", "cross_kv")):
            values *= config.decoder.head_dim**-0.25  # scores are not scaled; this keeps the softmax from saturating
        fused[name] = values.to(dtype)
    fused["decoder.head"][config.decoder.eos_token_id] = 0
    return DiaModel(config, ops).load(rounded(fused, config, weights))


def state_for(model: DiaModel, load: Load) -> DecodeState:
    """Every slot in use, with room for the longest grid and pages filled with noise."""
    context = min(CONTEXT, model.config.decoder.max_position_embeddings + 1)
    max_text = min(MAX_TEXT, model.config.encoder.max_position_embeddings)
    pages = load.rows * -(-context // 32)
    text_pages = load.batch * -(-max_text // 32)
    sizes = Sizes(load.batch, load.rows > 1, context, max_text, pages, text_pages)
    state = DecodeState(model.config, model.ops, sizes, model.dtype, model.device)
    for table_idx in range(load.batch):
        state.cross_blocks.grow(table_idx, load.text)
        state.grow(table_idx, context)
    for pool in (state.pool, state.cross_pool):
        for pages_of_layer in (*pool.keys, *pool.values):
            pages_of_layer.normal_().mul_(pages_of_layer.shape[-1] ** -0.25)
    state.text_lengths.fill_(load.text)
    state.end_step.fill_(1 << 20)
    state.guidance_scale.fill_(3.0 if load.rows > 1 else 1.0)
    state.temperature.fill_(1.2)
    state.top_p.fill_(0.95)
    state.top_k.fill_(45)
    return state


class CapturedStep:
    """One step as a graph. A new one has to be made for other configurations or ops: they are part of the graph."""

    def __init__(
        self, device: Device, model: DiaModel, state: DecodeState, load: Load, capture: Capture | None = None
    ) -> None:
        self.device, self.state, self.load = device, state, load
        self._begin()
        self._replay = (capture or device.capture)(partial(model.decode_step, state))

    def _begin(self) -> None:
        self.state.step.fill_(self.load.context)
        self.state.eos_step.fill_(-1)
        self.state.finished.zero_()

    def spans(self, replays: int = 12) -> list[float]:
        """Seconds of a step, averaged over the replays of each span; contexts grow by one with each."""
        self._begin()
        for _ in range(WARM_UP):
            self._replay()
        found = []
        for _ in range(SPANS):
            self.device.hold()
            start = self.device.now()
            for _ in range(replays):
                self._replay()
            found.append((self.device.now() - start) / replays)
        return found

    def seconds(self) -> float:
        """Of a step: the median span."""
        return statistics.median(self.spans())


class QuickCapture:
    """Captures as the engine does, but leaves out the garbage collection before it: many graphs, none kept for long."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            step()
            self._stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay


def without(ops: Any, op: str) -> Any:
    """Return the op set, one op of which does nothing."""

    class Without:
        name = ops.name

        def __getattr__(self, name: str) -> Any:
            return (lambda *args, **named: None) if name == op else getattr(ops, name)

    return Without()
