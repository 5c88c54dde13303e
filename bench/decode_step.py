"""How long does one decode step take, and how does that compare with transformers on the same weights?

    python -m bench.decode_step --model FOLDER [--against transformers] [--dtype bfloat16] [--steps 16] [--rounds 3]

Both sides generate through their public entry points, greedily, in one process and in turns. The time of a step is the
time between two calls that each side makes anyway (a progress callback, a stopping criterion): everything that a step
costs the user is in it. transformers gets views of our packed weights, so nothing is in memory twice.
`--clock cpu` counts the processor time of this process instead, for a machine that is busy with other things.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dia_fast.checkpoint import open_checkpoint
from dia_fast.config import DiaConfig
from dia_fast.engine import Request, generate
from dia_fast.errors import DiaFastError
from dia_fast.model import DiaModel
from dia_kernels import get_ops

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 3  # steps at the start of each round that do not count

Run = Callable[[Callable[[], None]], Any]  # runs to the end and calls its argument after each step


def bytes_per_step(model: DiaModel) -> int:
    """Weights that one step has to read: all of the decoder's but the tables it looks up in and the text's K and V."""
    once = [
        tensor
        for name, tensor in model.decoder.state_dict().items()
        if name != "embedding" and not name.endswith("cross_kv")
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in once)


def our_run(model: DiaModel, requests: Sequence[Request]) -> Run:
    """Our `generate`."""
    return lambda note: generate(model, requests, progress=lambda _: note())


def their_run(theirs: Any, config: DiaConfig, requests: Sequence[Request]) -> Run:
    """`generate` of transformers."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    from tests.parity.pairs import random_prompts, their_rows

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


def step_times(run: Run, clock: Callable[[], float]) -> list[float]:
    """Seconds of each step after the warm-up."""
    marks: list[float] = []

    def note() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(clock())

    run(note)
    return [after - before for before, after in zip(marks, marks[1:], strict=False)][WARM_UP:]


def describe_machine(device: torch.device) -> str:
    """The model name of the processor, and how many threads torch uses; nothing that identifies the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def requests_for(config: DiaConfig, options: argparse.Namespace) -> list[Request]:
    """Random texts of one length, so that transformers need not pad; the same prompt length for all."""
    texts = torch.randint(1, config.encoder.vocab_size, (options.batch, options.text)).tolist()
    decoder = config.decoder
    prompt = torch.randint(0, decoder.eos_token_id, (options.prompt, decoder.num_channels)) if options.prompt else None
    new = options.steps + WARM_UP + 1
    return [Request(ids, prompt, new, options.guidance, temperature=0.0) for ids in texts]


def load(options: argparse.Namespace) -> DiaModel:
    checkpoint = open_checkpoint(options.model)
    weights = checkpoint.load(DTYPES[options.dtype], options.device)
    # EOS in the first rows would end the run; a row of zeros never wins.
    weights["decoder.head"][checkpoint.config.decoder.eos_token_id] = 0
    return DiaModel(checkpoint.config, get_ops(options.backend, options.device)).load(weights)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if transformers was faster."""
    parser = argparse.ArgumentParser(prog="decode_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, file or Hub id; bench.make_checkpoint makes one")
    parser.add_argument("--against", choices=("transformers",))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=3.0, help="1 for none")
    parser.add_argument("--text", type=int, default=200, help="bytes of text")
    parser.add_argument("--prompt", type=int, default=0, help="frames of audio prompt")
    parser.add_argument("--steps", type=int, default=16, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        model = load(options)
    except DiaFastError as error:
        print(f"decode_step: {error}", file=sys.stderr)
        return 2
    return report(model, options)


def report(model: DiaModel, options: argparse.Namespace) -> int:
    """Runs both sides in turns and prints the medians."""
    requests = requests_for(model.config, options)
    sides = {"dia-fast": our_run(model, requests)}
    if options.against:
        from tests.parity.pairs import theirs_sharing

        sides["transformers"] = their_run(theirs_sharing(model), model.config, requests)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            seconds[name] += step_times(run, CLOCKS[options.clock])
    moved = bytes_per_step(model)
    guidance = f"guidance {options.guidance:g}" if options.guidance != 1 else "no guidance"
    print(
        f"{describe_machine(model.device)}; torch {torch.__version__}, ops: {model.ops.name}\n"
        f"{options.dtype}, batch {options.batch}, {guidance}, {options.text} bytes of text, {options.prompt} frames of "
        f"prompt; a step reads {moved / 1e9:.3f} GB of weights; {options.clock} clock"
    )
    for name, times in seconds.items():
        middle = statistics.median(times)
        spread = f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"
        print(f"{name:13} {middle * 1e3:8.1f} ms ({spread}), {moved / middle / 1e9:.2f} GB/s, {len(times)} steps")
    if len(seconds) == 1:
        return 0
    ours, theirs_time = (statistics.median(times) for times in seconds.values())
    print(f"ratio {ours / theirs_time:.3f} of transformers' time")
    return int(ours > theirs_time)


if __name__ == "__main__":
    sys.exit(main())
