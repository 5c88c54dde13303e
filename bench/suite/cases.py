"""The calls that Dia-1.6B makes, with tensors to make them on: taken from the model's own code, not written down again.

`dia_fast.diagnostics.launches` runs the model on the meta device; what it calls is noted here by name and shape.
`Case.make` then fills tensors of those shapes with values that the op accepts.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.suite import costs
from dia_fast.diagnostics import launches
from dia_fast.diagnostics.doctor import IN_8_BITS
from dia_fast.model.config import DiaConfig
from dia_fast.model.quantization import FLOAT, INT8
from dia_kernels import reference
from dia_kernels.reference import PackedWeight
from dia_kernels.reference.quantized import Int8Weight, quantize

TEXT = 256  # bytes of text that cross-attention reads
CONTEXTS = (64, 1024, 3072)
POISON = ("out", "total")  # written and never read: filled with NaN, so that what is left unwritten shows
_LEAST_CONTEXT = CONTEXTS[0]


@dataclass(frozen=True)
class Case:
    """One op at one shape. meta: its arguments by name, on the meta device; context: tokens that attention reads.

    headline: whether it is one of the shapes that torch.compile is timed at too. in_8_bits: by weights in 8 bits.
    """

    op: str
    shape: str
    meta: Mapping[str, Any] = field(repr=False)
    context: int = _LEAST_CONTEXT
    headline: bool = False
    in_8_bits: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}-{self.shape}{IN_8_BITS if self.in_8_bits else ''}".replace(" ", "-")

    @property
    def subject(self) -> str:
        """Its name among the verdicts of `dia-fast doctor`."""
        return self.op + (IN_8_BITS if self.in_8_bits else "")

    @property
    def cost(self) -> costs.Cost:
        return costs.cost(self.op, self.meta, self.context)

    @property
    def memory(self) -> int:
        """Bytes of a set of arguments."""
        tensors = ((name, value) for name, value in self.meta.items() if isinstance(value, Tensor))
        packed = sum(value.nbytes for value in self.meta.values() if isinstance(value, PackedWeight))
        return packed + sum(self._shape(name, value).numel() * value.itemsize for name, value in tensors)

    def call(self, ops: Any, arguments: Mapping[str, Any]) -> Callable[[], Any]:
        """Return the op of an op set on a set of arguments, passed as the model passes them."""
        bound = inspect.signature(getattr(reference, self.op)).bind(**arguments)
        return partial(getattr(ops, self.op), *bound.args, **bound.kwargs)

    def make(self, ops: Any, device: torch.device, seed: int) -> dict[str, Any]:
        """Return a set of arguments, by name, with memory of its own. ops: whose scratch memory attention gets."""
        generator = torch.Generator(device).manual_seed(seed)
        made: dict[str, Any] = {}
        for name, value in self.meta.items():
            if isinstance(value, Int8Weight):
                made[name] = quantize(self._fill(name, value.values.half(), device, generator))
            else:
                made[name] = self._fill(name, value, device, generator) if isinstance(value, Tensor) else value
        if "workspace" in made or self.op in ("rope_attention", "cross_attention"):
            rows, width = made["out"].shape
            dim, table = made["k_pages"].shape[3], made["block_table"]
            length = table.shape[1] * made["k_pages"].shape[2]
            made["workspace"] = ops.attention_workspace(rows, width // dim, dim, length, device)
        return made

    def _shape(self, name: str, value: Tensor) -> torch.Size:
        """As noted; of the page pools only as many pages as are read."""
        if self.op == "rope_attention" and name in ("k_pages", "v_pages"):
            rows, size = self.meta["positions"].shape[0], value.shape[2]
            return torch.Size([rows * -(-self.context // size), *value.shape[1:]])
        return value.shape

    def _fill(self, name: str, value: Tensor, device: torch.device, generator: torch.Generator) -> Any:
        shape, dtype = self._shape(name, value), value.dtype
        if not dtype.is_floating_point:
            return self._integers(name, shape).to(device, dtype)
        if name in POISON or (self.op == "embed_codes" and name == "x"):
            return torch.full(shape, torch.nan, dtype=dtype, device=device)
        if name in ("cos", "sin"):
            rates = 1e4 ** -torch.linspace(0, 1, shape[1], device=device)
            angles = torch.arange(shape[0], device=device)[:, None] * rates
            return angles.cos() if name == "cos" else angles.sin()
        settings = {"guidance_scale": 3.0, "temperature": 1.2, "top_p": 0.95}
        if name in settings:
            return torch.full(shape, settings[name], device=device)
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        if len(shape) == 1:
            values.mul_(0.1).add_(1)  # weights of norms, frequencies of snake
        elif name == "weight":
            values.mul_(shape[1] ** -0.5)
        elif name in ("qkv", "q", "k", "k_pages"):
            values.mul_(self._head_dim() ** -0.25)  # scores are not scaled; this keeps the softmax from saturating
        return nn.Parameter(values, requires_grad=False) if "weight" in name or name == "table" else values

    def _head_dim(self) -> int:
        return int(2 * self.meta["cos"].shape[1] if "cos" in self.meta else self.meta["q"].shape[-1])

    def _integers(self, name: str, shape: torch.Size) -> Tensor:
        count = shape.numel()
        if name == "block_table":
            keys = "k_pages" if "k_pages" in self.meta else "k"
            pages = self._shape(keys, self.meta[keys])[0]
            if self.op != "rope_attention":
                return (torch.arange(count) % pages).view(shape)
            used = pages // shape[0]
            table = torch.zeros(shape, dtype=torch.int64)
            table[:, :used] = torch.arange(pages).view(shape[0], used)
            return table
        values: dict[str, Callable[[], Tensor]] = {
            "starts": lambda: torch.arange(count) * self.meta["q"].shape[0] // (count - 1),
            "slot_mapping": lambda: torch.arange(count),
            "positions": lambda: torch.arange(count) if self.op == "rope" else torch.full(shape, self.context - 1),
            "lengths": lambda: torch.full(shape, TEXT),
            "kv_lengths": lambda: torch.full(shape, self.context),
            "step": lambda: torch.full(shape, self.context - 1),
            "end_step": lambda: torch.full(shape, self.meta["codes"].shape[1] - 1),
            "eos_step": lambda: torch.full(shape, -1),
            "prompt_codes": lambda: torch.full(shape, -1),
            "sampled": lambda: torch.arange(count).view(shape) * 7 % 1000,
            "delay": lambda: torch.arange(count),
            "top_k": lambda: torch.full(shape, 45),
        }  # fmt: skip
        return values.get(name, lambda: torch.zeros(shape))()


class _Notes:
    """An op set that computes nothing and notes every call."""

    name = "notes"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def attention_workspace(self, *args: Any) -> None:
        return None

    def __getattr__(self, op: str) -> Callable[..., None]:
        signature = inspect.signature(getattr(reference, op))

        def note(*args: Any, **named: Any) -> None:
            self.calls.append((op, dict(signature.bind(*args, **named).arguments)))

        return note


def all_cases(dtype: torch.dtype, rows: tuple[int, ...], quick: bool = False) -> list[Case]:
    """Every op of a decode step for each number of rows, and every op of the encoder, prefill and codec.

    Projections are there twice, the second time by weights in 8 bits.

    quick: at an eighth of the width and length of the real ones, one context only.
    """
    found: dict[str, Case] = {}
    for count in rows:
        for op, arguments in _decode_calls(dtype, count, quick, INT8):
            if isinstance(arguments.get("weight"), Int8Weight):
                case = Case(op, _label(op, arguments, _LEAST_CONTEXT), arguments, in_8_bits=True)
                found.setdefault(case.name, case)
        for op, arguments in _decode_calls(dtype, count, quick):
            contexts = CONTEXTS[:1] if quick or op != "rope_attention" else CONTEXTS
            for context in contexts:
                case = Case(op, _label(op, arguments, context), arguments, context, headline=count == 2)
                found.setdefault(case.name, case)
    text, frames = (64, 20) if quick else (launches.TEXT, launches.FRAMES)
    notes: Any = _Notes()
    launches.prefill(dtype, notes, small_config() if quick else None, text, frames)
    for op, arguments in notes.calls:
        case = Case(op, _label(op, arguments, text), arguments, text, headline=True)
        found.setdefault(case.name, case)
    return list(found.values())


def _decode_calls(
    dtype: torch.dtype, rows: int, quick: bool, weights: str = FLOAT
) -> Iterator[tuple[str, dict[str, Any]]]:
    notes: Any = _Notes()
    model = launches.one_layer(dtype, notes, small_config() if quick else None, weights)
    launches.decode(rows, dtype, notes, model)
    yield from notes.calls


def small_config() -> DiaConfig:
    """Dia's proportions at an eighth of its width, for a quick look at whether everything runs."""
    config = DiaConfig()
    encoder = replace(
        config.encoder, hidden_size=128, intermediate_size=512, num_attention_heads=2, num_key_value_heads=2
    )  # fmt: skip
    decoder = replace(
        config.decoder, hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=1,
        cross_num_attention_heads=2, cross_num_key_value_heads=2, cross_hidden_size=128,
    )  # fmt: skip
    return replace(config, encoder=encoder, decoder=decoder)


def _label(op: str, a: Mapping[str, Any], context: int) -> str:
    """Return a label that tells the shapes of one op apart."""
    if op == "rope_attention":
        return f"rows {a['qkv'].shape[0]} context {context}"
    if op == "cross_attention":
        return f"rows {a['q'].shape[0]} text {TEXT}"
    if op in ("embed_codes", "sample"):
        rows = a["x" if op == "embed_codes" else "logits"]
        return f"requests {a['step'].shape[0]} rows {rows.shape[0]}"
    if op == "ragged_attention":
        kind = " text" if "block_table" in a else " causal" if a["causal"] else ""
        return f"tokens {a['q'].shape[0]}{kind}"
    if op in ("snake", "snake_residual"):
        return f"{a['x'].shape[1]}x{a['x'].shape[2]}"
    if op in ("rope", "rms_norm", "glu"):
        tensor = a["qkv"] if op == "rope" else a["x"]
        return f"tokens {tensor.shape[0]} width {tensor.shape[1]}"
    rows = f"rows {a['x'].shape[0]}" + (f" of {a['residual'].shape[0]}" if a.get("constant") is not None else "")
    return f"{rows} {a['weight'].shape[1]} to {a['weight'].shape[0]}"
