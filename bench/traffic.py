"""Count the bytes that each kernel of a decode step moves, and the fewest that it could.

    python -m bench.traffic [--rows 1 2 8] [--contexts 64 1024 3072] [--dtype bfloat16] [--weights int8]

Counted, not estimated: the kernels run under the repaired interpreter at the shapes of one layer of Dia-1.6B, and
every active lane of every load and store is noted by argument. Lanes of one access that share an address count once,
as a GPU would fetch them; everything else counts as often as it is asked for. The result is the same to the byte every
time. Exit status 1 if a weight is not read exactly once, or a step moves more than 1.05 x the minimum.

Weights and keys and values are too large for a cache: each time they are read counts. Activations, some hundred KB, are
read by many programs and come from the L2 cache after the first: what they add to the traffic of the memory is their
size, and what is read again is in a column of its own.
"""

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # a GPU is not asked

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.make_checkpoint import DTYPES
from bench.tools.interpreter import Access, install, listening
from bench.tools.own_ops import add_ops_option, chosen_ops
from bench.tools.results import Results, add_options
from dia_fast.diagnostics.launches import one_layer
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.cpu_weights import set_matrix
from dia_fast.model.decode_state import DecodeState, Sizes, cross_pages, self_pages
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, INT8, INT8_MLP, WEIGHTS, quantized_names
from dia_fast.utils.files import replacing
from dia_kernels import launcher as launch
from dia_kernels import triton as kernels
from dia_kernels.reference.linear import Weight
from dia_kernels.reference.quantized import Int8Weight, quantize
from dia_kernels.triton import gemv

LIMIT = 1.05  # bytes moved by a step, beside the fewest possible
SHARES = {INT8: 0.53, INT8_MLP: 0.66}  # of what 16 bits move, up to two rows at the first context
PROJECTIONS = ("qkv", "o", "cross_q", "cross_kv", "cross_o", "gate_up", "down", "head")
TEXT = 256  # bytes of text that cross-attention reads


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch. weights and kv: every access counts; other: distinct bytes read, and written.

    again: what was read of `other` a second time and more. minimum: what the op cannot do without: its weights, its
    keys and values, its inputs and outputs once each, but no scratch. weights_once: whether every element of every
    weight was read exactly once. saved: bytes of weights that 8 bits spare, beside the dtype of the activations.
    """

    rows: int
    context: int
    kernel: str
    weights: int
    kv: int
    other: int
    again: int
    minimum: int
    weights_once: bool
    saved: int = 0

    @property
    def moved(self) -> int:
        return self.weights + self.kv + self.other


class Counter:
    """Reads and writes of each element of one argument in one launch."""

    def __init__(self, tensor: Tensor, size: int) -> None:
        self.tensor, self.size = tensor, size
        self.reads: NDArray[np.uint16] = np.zeros(_extent(tensor), np.uint16)
        self.writes: NDArray[np.uint16] = np.zeros(_extent(tensor), np.uint16)

    def note(self, access: Access) -> None:
        places = np.unique(access.offsets) // self.size
        if access.kind in ("load", "atomic"):
            self.reads[places] += 1
        if access.kind in ("store", "atomic"):
            self.writes[places] += 1

    @property
    def read(self) -> int:
        return int(self.reads.sum()) * self.size

    @property
    def read_distinct(self) -> int:
        return int((self.reads > 0).sum()) * self.size

    @property
    def written(self) -> int:
        return int(self.writes.sum()) * self.size

    @property
    def written_distinct(self) -> int:
        return int((self.writes > 0).sum()) * self.size


class Meter:
    """Counts the accesses of each launch. weights, kv, scratch: the tensors that are these; dtype: of activations.

    kv_minimum: bytes of keys and values that a launch of the kernel named must move.
    """

    def __init__(
        self,
        weights: Iterable[Weight],
        kv: Iterable[Tensor],
        scratch: Iterable[Tensor],
        kv_minimum: dict[str, int],
        dtype: torch.dtype,
    ) -> None:
        matrices = list(weights)
        scales = [matrix.scales for matrix in matrices if isinstance(matrix, Int8Weight)]
        values = [gemv.parts(matrix)[0] for matrix in matrices]
        self.weights, self.scales, self.kv, self.scratch = (
            {tensor.data_ptr() for tensor in tensors} for tensors in ([*values, *scales], scales, kv, scratch)
        )
        self.dtype = dtype
        self.kv_minimum = kv_minimum
        self._counters: dict[str, Counter] = {}

    def launched(self, run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: Any) -> "tuple[str, Counts]":
        """Run one launch and return its kernel's name and what was counted."""
        self._counters = {}
        with listening(self._note):
            run(kernel, grid, *args, **meta)
        return kernel.fn.__name__.lstrip("_"), self._counters

    def _note(self, access: Access) -> None:
        counter = self._counters.get(access.argument)
        if counter is None:
            counter = self._counters[access.argument] = Counter(access.tensor, access.size)
        counter.note(access)

    def judge(self, rows: int, context: int, kernel: str, counters: "Counts") -> Traffic:
        """Tell the arguments of a launch apart and add them up."""
        weights = kv = other = again = saved = 0
        minimum, once = self.kv_minimum.get(kernel, 0), True
        for counter in counters.values():
            place = counter.tensor.data_ptr()
            if place in self.weights:
                weights += counter.read + counter.written
                minimum += counter.tensor.nbytes
                once &= bool((counter.reads == 1).all()) and not counter.written
                if place in self.scales:
                    saved -= counter.tensor.nbytes
                elif counter.tensor.dtype == torch.int8:
                    saved += counter.tensor.numel() * (self.dtype.itemsize - 1)
            elif place in self.kv:
                kv += counter.read + counter.written
            else:
                other += counter.read_distinct + counter.written
                again += counter.read - counter.read_distinct
                if place not in self.scratch:
                    minimum += counter.read_distinct + counter.written_distinct
        return Traffic(rows, context, kernel, weights, kv, other, again, minimum, once, saved)


Counts = dict[str, Counter]


def measure(
    config: DiaConfig,
    rows: int,
    contexts: Sequence[int],
    dtype: torch.dtype,
    weights: str = FLOAT,
    ops: ModuleType = kernels,
) -> list[Traffic]:
    """Every launch of a decode step of one layer at the first context, and self-attention at the others."""
    model, state = _ready(config, rows, max(contexts), dtype, weights, ops)
    decoder, layer = config.decoder, model.decoder.layers[0]
    token = 2 * decoder.num_key_value_heads * decoder.head_dim * dtype.itemsize
    text = 2 * decoder.cross_num_key_value_heads * decoder.cross_head_dim * dtype.itemsize * TEXT * state.batch
    meter = Meter(
        [getattr(module, name) for module in (layer, model.decoder) for name in PROJECTIONS if hasattr(module, name)],
        state.pool.keys + state.pool.values + state.cross_pool.keys + state.cross_pool.values,
        [*state.workspace, *state.cross_workspace],
        {"cross_attention": text},
        dtype,
    )
    found = []
    for context in contexts:
        meter.kv_minimum["rope_attention"] = token * rows * context  # one of them is written, the others are read
        state.step.fill_(context - 1)
        state.finished.zero_()
        state.positions.fill_(context - 1)

        def note(run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: Any, context: int = context) -> None:
            found.append(meter.judge(rows, context, *meter.launched(run, kernel, grid, args, meta)))

        with launch.listening(note):
            if context == contexts[0]:
                model.decode_step(state)
            else:
                model.ops.rope_attention(
                    state.qkv, model.decoder.cos, model.decoder.sin, state.pool.keys[0], state.pool.values[0],
                    state.table, state.positions, state.attended, state.workspace,
                )  # fmt: skip
    return found


def _ready(
    config: DiaConfig, rows: int, context: int, dtype: torch.dtype, weights: str, ops: ModuleType
) -> tuple[DiaModel, DecodeState]:
    """One layer with random weights, and slots that are `context` rows long."""
    model = one_layer(dtype, ops, config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.decoder.parameters(), *model.decoder.buffers()]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator).mul_(tensor.shape[-1] ** -0.5))
    for path in quantized_names(model.config, weights):
        module, _, name = path.rpartition(".")
        if module.startswith("decoder"):
            set_matrix(model.get_submodule(module), name, quantize(model.get_parameter(path)))
    batch = max(rows // 2, 1)
    grid, text = self_pages(model.config), cross_pages(model.config)
    sizes = Sizes(batch, rows > 1, context + 1, TEXT, rows * grid.pages(context + 1), batch * text.pages(TEXT))
    state = DecodeState(model.config, ops, sizes, dtype, torch.device("cpu"))
    for batch_idx in range(batch):
        state.grow(batch_idx, context + 1)
        state.cross_blocks.grow(batch_idx, TEXT)
    for pages in state.pool.keys + state.pool.values + state.cross_pool.keys + state.cross_pool.values:
        pages.copy_(torch.randn(pages.shape, generator=generator))
    state.text_lengths.fill_(TEXT)
    state.end_step.fill_(context + 99)
    return model, state


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last one."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def whole_step(found: Sequence[Traffic], rows: int, context: int, layers: int) -> tuple[int, int]:
    """Bytes moved and fewest possible of a whole step: the launches of one layer `layers` times, the others once."""
    outside = ("embed_codes", "codebook_logits", "sample")
    moved = minimum = 0
    for item in found:
        here = item.context == context if item.kernel == "rope_attention" else item.context == found[0].context
        if item.rows == rows and here:
            times = 1 if item.kernel in outside else layers
            moved, minimum = moved + times * item.moved, minimum + times * item.minimum
    return moved, minimum


def share_of_float(found: Sequence[Traffic], rows: int, context: int, layers: int) -> float:
    """Bytes that a whole step moves, over those that it would move if no weights were in 8 bits."""
    moved, _ = whole_step(found, rows, context, layers)
    wide, _ = whole_step([replace(item, weights=item.weights + item.saved) for item in found], rows, context, layers)
    return moved / wide


def violations(found: Sequence[Traffic], layers: int, weights: str = FLOAT) -> list[str]:
    """Return the rules that the counts break, a sentence each."""
    broken = [
        f"{item.kernel} at {item.rows} rows does not read every weight exactly once"
        for item in found
        if not item.weights_once
    ]
    for rows, context in sorted({(item.rows, item.context) for item in found}):
        moved, minimum = whole_step(found, rows, context, layers)
        share = share_of_float(found, rows, context, layers)
        if rows <= 2 and context == found[0].context and share > SHARES.get(weights, 1):
            broken.append(
                f"a step of {rows} rows at context {context} moves {share:.3f} x what it would without weights in 8 "
                f"bits; {SHARES[weights]} is allowed"
            )
        if moved > LIMIT * minimum:
            broken.append(
                f"a step of {rows} rows at context {context} moves {moved / minimum:.3f} x the fewest bytes possible; "
                f"{LIMIT} is allowed"
            )
    return broken


def markdown(found: Sequence[Traffic], layers: int) -> str:
    """Return the tables of a report."""
    lines = [
        "| rows | context | kernel | weights | keys, values | other | read again from cache | moved / minimum |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for item in found:
        lines.append(
            f"| {item.rows} | {item.context} | `{item.kernel}` | {item.weights:,} | {item.kv:,} | {item.other:,} | "
            f"{item.again:,} | {item.moved / item.minimum:.4f} |"
        )
    lines += ["", "| rows | context | a whole step moves | at least | ratio | of what it moves without 8 bits |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for rows, context in sorted({(item.rows, item.context) for item in found}):
        moved, minimum = whole_step(found, rows, context, layers)
        share = share_of_float(found, rows, context, layers)
        lines.append(f"| {rows} | {context} | {moved:,} | {minimum:,} | {moved / minimum:.4f} | {share:.4f} |")
    return "\n".join(lines) + "\n"


def _result(item: Traffic) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return case and values of a launch."""
    values = asdict(item)
    return {name: values.pop(name) for name in ("rows", "context", "kernel")}, values


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="traffic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 1024, 3072])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--weights", choices=WEIGHTS, default=FLOAT)
    parser.add_argument("--markdown", type=Path)
    add_ops_option(parser)
    add_options(parser)
    options = parser.parse_args(arguments)
    install()
    try:
        ops = chosen_ops(options.ops)
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"traffic: {error}", file=sys.stderr)
        return 2
    config = DiaConfig()
    found: list[Traffic] = []
    with torch.inference_mode():
        for rows in options.rows:
            found += measure(config, rows, options.contexts, DTYPES[options.dtype], options.weights, ops)
            print(f"counted {rows} rows", file=sys.stderr, flush=True)
    layers = config.decoder.num_hidden_layers
    table = markdown(found, layers)
    print(table)
    results.extend(map(_result, found))
    if options.markdown is not None:
        with replacing(options.markdown) as temporary:
            temporary.write_text(table)
    broken = violations(found, layers, options.weights)
    print("\n".join(broken) or "no violations")
    return results.end(1 if broken else 0)


if __name__ == "__main__":
    sys.exit(main())
