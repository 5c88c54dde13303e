"""Parts that benchmarks share: clocks, the machine, the model under test and transformers on the same weights."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.engine import Request, generate
from dia_fast.model.config import DiaConfig
from dia_fast.model.device import choose_device
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, WEIGHTS, rounded
from dia_kernels import get_ops

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARM_UP = 3  # steps at the start of a run that do not count

Run = Callable[[Callable[[], None]], Any]  # runs to the end and calls its argument after each step


class Seconds(NamedTuple):
    """A moment or a span on two clocks: wall time, and processor time of this process over all its threads.

    Other processes lengthen the first; the second suffers only through shared caches and memory, and through threads
    that spin while they wait for one that was interrupted.
    """

    wall: float
    cpu: float

    def since(self, start: "Seconds") -> "Seconds":
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


def now() -> Seconds:
    """Return this moment, with all work of the GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


def least(spans: Sequence[Seconds]) -> Seconds:
    """Return the shortest of each clock: the span that was disturbed least."""
    return Seconds(min(span.wall for span in spans), min(span.cpu for span in spans))


def median(spans: Sequence[Seconds]) -> Seconds:
    """Return the median of each clock."""
    return Seconds(statistics.median(span.wall for span in spans), statistics.median(span.cpu for span in spans))


def step_times(run: Run) -> list[Seconds]:
    """Return the times of the steps after the warm-up."""
    marks: list[Seconds] = []
    run(lambda: marks.append(now()))
    return [after.since(before) for before, after in zip(marks, marks[1:], strict=False)][WARM_UP:]


def our_run(model: DiaModel, requests: Sequence[Request]) -> Run:
    """Our `generate`."""
    return lambda note: generate(model, requests, progress=lambda _: note())


def their_run(theirs: Any, config: DiaConfig, requests: Sequence[Request]) -> Run:
    """`generate` of transformers, as one static batch."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    from bench.tools.pairs import random_prompts, their_rows

    class Clock(StoppingCriteria):
        def __init__(self, note: Callable[[], None]) -> None:
            self.note = note

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.note()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    first = requests[0]
    prompts = random_prompts(config, [0 if first.prompt is None else len(first.prompt)] * len(requests))
    texts = [request.text_ids for request in requests]
    limits = {"max_new_tokens": first.max_new_tokens, "guidance_scale": first.guidance_scale, "top_k": first.top_k}

    def run(note: Callable[[], None]) -> None:
        their_rows(theirs, config, texts, prompts, stopping_criteria=StoppingCriteriaList([Clock(note)]), **limits)

    return run


def use(device: torch.device) -> torch.device:
    """Make a numbered GPU the current device, so that launches, graphs and events go there; return the device."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def load(options: argparse.Namespace) -> tuple[DiaModel, Any]:
    """Our model, packed where that helps, and transformers' on the same weights where `--against` asks for it.

    The code that ends a sentence never wins, so that every run has the length that was asked for. Raises DiaFastError.
    """
    device = use(choose_device(options.device))
    checkpoint = open_checkpoint(options.model)
    weights = checkpoint.load(DTYPES[options.dtype], device)
    weights["decoder.head"][checkpoint.config.decoder.eos_token_id] = 0
    ops = get_ops(options.backend, device)
    model = DiaModel(checkpoint.config, ops).load(weights)
    theirs = None
    if options.against:
        from bench.tools.pairs import theirs_sharing

        theirs = theirs_sharing(model)
    if options.weights != FLOAT:
        model = DiaModel(checkpoint.config, ops).load(rounded(weights, checkpoint.config, options.weights))
    del weights
    return model.pack(progress=True), theirs


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load` and `describe` read."""
    parser.add_argument("--model", required=True, help="folder, file or Hub id; bench.make_checkpoint makes one")
    parser.add_argument("--against", choices=("transformers",))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--weights", choices=WEIGHTS, default=FLOAT, help="ours, in 8 bits or not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--text", type=int, default=200, help="bytes of text")
    parser.add_argument("--guidance", type=float, default=3.0, help="1 for none")


def bytes_per_step(model: DiaModel) -> int:
    """Weights that one step has to read: all of the decoder's but the tables it looks up in and the text's K and V.

    Packed or not, a 16-bit weight is two bytes.
    """
    stack = model.decoder
    layers = [getattr(layer, name) for layer in stack.layers for name in ("qkv", "o", "cross_q", "cross_o")]
    layers += [getattr(layer, name) for layer in stack.layers for name in ("gate_up", "down")]
    norms = [getattr(layer, name) for layer in stack.layers for name in ("self_norm", "cross_norm", "mlp_norm")]
    return sum(weight.nbytes for weight in [*layers, *norms, stack.norm, stack.head])


def read_bandwidth(device: torch.device, size: int = 1 << 29) -> float:
    """Bytes per second that all threads together read from a buffer of `size` bytes: the best of ten sums."""
    buffer = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(10):
        start = now()
        buffer.sum()
        best = max(best, size / now().since(start).wall)
    return best


def describe(model: DiaModel, options: argparse.Namespace) -> str:
    """Two lines: the machine with what it reads per second, and the model with what a step reads."""
    guidance = f"guidance {options.guidance:g}" if options.guidance != 1 else "no guidance"
    packed = ", weights packed" if model.packed else ""
    return (
        f"{describe_machine(model.device)}, reads {read_bandwidth(model.device) / 1e9:.1f} GB/s; "
        f"torch {torch.__version__}, ops: {model.ops.name}{packed}\n"
        f"{options.dtype}, {guidance}, {options.text} bytes of text; "
        f"a step reads {bytes_per_step(model) / 1e9:.3f} GB of weights"
    )


def describe_machine(device: torch.device) -> str:
    """Return the model name of the processor, and how many threads torch uses; nothing that identifies the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {torch.get_num_threads()} threads"
