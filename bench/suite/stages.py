"""The stages of a run on a whole model: text encoder, prefill of a prompt, decode step, codec."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.device import Device
from bench.measure import bytes_per_step
from bench.suite.cases import TEXT, small_config
from dia_fast.audio.codec import Codec, CodecConfig, random_codec
from dia_fast.diagnostics.doctor import random_model
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState, Sizes, cross_pages, self_pages
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel

SPARE = 8  # rows of a grid beyond the context that is timed: warm-up and capture make a few steps


@dataclass(frozen=True)
class Stage:
    """A stage of the model at one size.

    kind: "encode", "prefill", "step" or "codec"; size: bytes of text, frames, or tokens of context; requests: of a
    step, each with guidance.
    """

    kind: str
    size: int
    requests: int = 1

    @property
    def name(self) -> str:
        if self.kind == "step":
            return f"step-requests-{self.requests}-context-{self.size}"
        return f"{self.kind}-{self.size}-" + {"encode": "bytes", "prefill": "frames", "codec": "frames"}[self.kind]


def all_stages(gpu: bool, quick: bool) -> list[Stage]:
    """Return the stages to time: fewer on a CPU and in a quick run."""
    if quick:
        steps = [(64, 1), (64, 2), (256, 1)]
        return [Stage("encode", 60), Stage("prefill", 43), *(Stage("step", *s) for s in steps), Stage("codec", 10)]
    batches = (2, 4, 8, 16, 32) if gpu else (2, 4, 8)
    contexts = (64, 256, 1024, 2048, 3000) if gpu else (64, 1024, 3000)
    return [
        *(Stage("encode", size) for size in ((200, 1024) if gpu else (200,))),
        *(Stage("prefill", size) for size in ((430, 860) if gpu else (430,))),
        *(Stage("step", context) for context in contexts),
        *(Stage("step", contexts[0], batch) for batch in batches),
        *(Stage("codec", size) for size in ((86, 860) if gpu else (86,))),
    ]


class Work(NamedTuple):
    """call(ops) does it; reset makes it the same work again.

    bytes, operations: the fewest with which the model can do it: weights, keys and values once each, products alone.
    """

    call: Callable[[Any], Any]
    reset: Callable[[], None] | None
    bytes: int
    operations: int


class Models:
    """The model and codec of a session, made at first use; every backend runs on the same weights.

    On a CPU one layer each of encoder and decoder at full width: the others do the same.
    """

    def __init__(self, device: Device, dtype: torch.dtype, quick: bool) -> None:
        self.device, self.dtype, self.quick = device, dtype, quick
        self._model: DiaModel | None = None
        self._codec: Codec | None = None

    @property
    def config(self) -> DiaConfig:
        config = small_config() if self.quick else DiaConfig()
        if self.device.gpu and not self.quick:
            return config
        encoder = replace(config.encoder, num_hidden_layers=1)
        return replace(config, encoder=encoder, decoder=replace(config.decoder, num_hidden_layers=1))

    def model(self, ops: Any) -> DiaModel:
        """Random weights, packed where that helps."""
        if self._model is None:
            from dia_kernels import reference

            self._model = random_model(self.config, reference, self.dtype, self.device.torch)
            # The code that ends a sentence never wins: a slot that has ended would cost less.
            self._model.decoder.head[self.config.decoder.eos_token_id] = 0
            self._model.pack()
        self._model.ops = ops
        return self._model

    def codec(self, ops: Any) -> Codec:
        config = CodecConfig(decoder_hidden_size=96) if self.quick else CodecConfig()
        if self._codec is None:
            dtype = self.dtype if self.device.gpu else torch.float32
            self._codec = random_codec(config, device=self.device.torch, dtype=dtype)
        self._codec.network.decoder.ops = ops
        return self._codec

    def work(self, stage: Stage, ops: Any) -> Work:
        """Return the function to time."""
        if stage.kind == "codec":
            return self._codec_work(stage, ops)
        model = self.model(ops)
        if stage.kind == "encode":
            ids = [1 + index % 250 for index in range(stage.size)]
            encoder, weights = self.config.encoder, _weights(self.config, "encoder.layers")
            attention = 4 * encoder.num_hidden_layers * encoder.num_attention_heads * encoder.head_dim * stage.size**2
            operations = 2 * stage.size * weights + attention
            return Work(_with(model, lambda: model.encode(ids)), None, weights * self.dtype.itemsize, operations)
        state = self._state(stage, ops)
        decoder = self.config.decoder
        token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * self.dtype.itemsize
        text = 2 * decoder.num_hidden_layers * decoder.cross_num_key_value_heads * decoder.cross_head_dim
        text *= TEXT * self.dtype.itemsize
        if stage.kind == "prefill":
            rows = torch.arange(stage.size * decoder.num_channels, device=self.device.torch).view(stage.size, -1) % 1000
            # The text's keys and values are there; those of the rows are stored, with guidance twice.
            # The halves are computed one after the other, and the unconditional one has no text.
            weights = 2 * _weights(self.config, "decoder.layers")
            weights -= 2 * _weights(self.config, "decoder.layers", "cross_kv")
            weights -= _weights(self.config, "decoder.layers", "cross_q", "cross_o")

            def both() -> None:
                model.prefill(rows, state, 0, TEXT)
                model.prefill(rows, state, 0, None)

            call = _with(model, both)
            moved = weights * self.dtype.itemsize + text + 2 * token * stage.size
            return Work(
                call, None, moved, guided_operations(self.config, stage.size, stage.size * (stage.size + 1) // 2)
            )

        def reset() -> None:
            state.step.fill_(stage.size - 1)
            state.finished.zero_()

        moved = bytes_per_step(model) + stage.requests * (2 * token * stage.size + text)
        head = 2 * state.rows * _weights(self.config, "decoder.head")
        operations = stage.requests * guided_operations(self.config, 1, stage.size) + head
        reset()
        return Work(_with(model, lambda: model.decode_step(state)), reset, moved, operations)

    def _codec_work(self, stage: Stage, ops: Any) -> Work:
        codec = self.codec(ops)
        codes = torch.arange(stage.size * codec.num_codebooks, device=self.device.torch).view(stage.size, -1) % 1000

        def call(chosen: Any) -> None:
            codec.network.decoder.ops = chosen
            codec.decode(codes)

        weights = sum(
            tensor.nbytes for name, tensor in codec.network.state_dict().items() if not name.startswith("encoder")
        )
        with FlopCounterMode(display=False) as counter:
            call(ops)
        return Work(call, None, weights, counter.get_total_flops())

    def _state(self, stage: Stage, ops: Any) -> DecodeState:
        """Slots of `stage.requests` requests, each with guidance, whose grids and texts are there."""
        batch, rows = stage.requests, stage.size + SPARE
        pages, text = self_pages(self.config), cross_pages(self.config)
        sizes = Sizes(batch, True, rows, TEXT, 2 * batch * pages.pages(rows), batch * text.pages(TEXT))
        state = DecodeState(self.config, ops, sizes, self.dtype, self.device.torch)
        for batch_idx in range(batch):
            state.grow(batch_idx, rows)
            state.cross_blocks.grow(batch_idx, TEXT)
        for pool in (state.pool, state.cross_pool):
            for tensor in pool.keys + pool.values:
                tensor.normal_(std=0.3)
        state.text_lengths.fill_(TEXT)
        state.end_step.fill_(rows - 1)
        state.guidance_scale.fill_(3.0)
        state.top_k.fill_(45)
        return state


def _with(model: DiaModel, call: Callable[[], Any]) -> Callable[[Any], None]:
    def run(ops: Any) -> None:
        model.ops = ops
        call()

    return run


def guided_operations(config: DiaConfig, tokens: int, pairs: int) -> int:
    """Of the decoder's layers, for so many tokens of one request and their unconditional copies.

    pairs: of a token and one that it attends to, in either branch. Cross-attention is the conditional branch's alone.
    """
    decoder = config.decoder
    every = _weights(config, "decoder.layers") - _weights(config, "decoder.layers", "cross_q", "cross_kv", "cross_o")
    conditional = _weights(config, "decoder.layers", "cross_q", "cross_o")
    attended = 2 * pairs * decoder.num_attention_heads * decoder.head_dim
    attended += tokens * TEXT * decoder.cross_num_attention_heads * decoder.cross_head_dim
    return 2 * tokens * (2 * every + conditional) + 4 * decoder.num_hidden_layers * attended


def _weights(config: DiaConfig, prefix: str, *names: str) -> int:
    """Elements of the matrices under a prefix: of all, or of those that are called so."""
    return sum(
        shape[0] * shape[1]
        for name, shape in fused_shapes(config).items()
        if name.startswith(prefix) and len(shape) == 2 and (not names or name.rsplit(".", 1)[-1] in names)
    )
