"""Does the model say the same on the kernels as on the torch reference, in every dtype, with and without graphs?

    python -m bench.parity [--device cuda] [--dtypes fp32 fp16 bf16] [--layers 2] [--steps 24] [--json FILE]

On random weights at the width of Dia-1.6B, a few layers deep. In fp32 the tokens have to be those of torch, greedily
and sampled, and those of transformers where it is installed; in 16 bits the error of the logits against fp32 may be
twice that of torch in the same dtype, plus one rounding. Graphs may not change a bit. Exit status 1 if anything does.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.make_checkpoint import random_weight
from bench.measure import use
from bench.tools.results import Results, add_options
from dia_fast.engine import Engine, Request, place, plan, prefill
from dia_fast.engine.decode_graphs import choose_capture
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState, Sizes, cross_pages, self_pages
from dia_fast.model.delay import FREE
from dia_fast.model.device import choose_device, choose_dtype
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops

TEXTS = (list(b"\x01 Did you hear that? \x02 Hear what?"), list(b"\x01 It was a bell, far away. \x02 I see."))
PROMPT = 12  # frames


@dataclass(frozen=True)
class Finding:
    """outcome: "ok", "wrong", "failed" (raised) or "unchecked"."""

    dtype: str
    what: str
    outcome: str
    detail: str


def weights_for(config: DiaConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random weights that keep activations of order one; the code that ends a sentence never wins."""
    weights = {name: random_weight(config, name, 0, dtype).to(device) for name in fused_shapes(config)}
    weights["decoder.head"][config.decoder.eos_token_id] = 0
    return weights


def requests(config: DiaConfig, steps: int, temperature: float) -> list[Request]:
    """Two of different length, one with an audio prompt."""
    codes = torch.arange(PROMPT * config.decoder.num_channels).view(PROMPT, -1) * 37 % config.decoder.eos_token_id
    settings: dict[str, Any] = {"max_new_tokens": steps, "temperature": temperature}
    return [Request(TEXTS[0], codes, seed=3, **settings), Request(TEXTS[1], None, seed=4, **settings)]


def speak(model: DiaModel, asked: Sequence[Request], capture: Any) -> list[Tensor]:
    """Return the rows of each request. capture: as in `Engine`."""
    with Engine(model, max_batch=len(asked), capture=capture) as engine:
        handles = [engine.submit(request) for request in asked]
        while engine.step():
            pass
        return [handle.result().delayed_codes.cpu() for handle in handles]


def forced_logits(model: DiaModel, request: Request, rows: Tensor) -> Tensor:
    """`[2, steps, channels, vocab]`: what decode steps predict, with and without the text, when every row is forced.

    rows: `[steps, channels]`, ordinary codes.
    """
    steps, device = rows.shape[0], model.device
    grid, text = self_pages(model.config), cross_pages(model.config)
    pages = 2 * grid.pages(steps + 1), text.pages(len(request.text_ids))
    sizes = Sizes(1, True, steps + 1, len(request.text_ids), *pages)
    state = DecodeState(model.config, model.ops, sizes, model.dtype, device)
    state.cross_blocks.grow(0, len(request.text_ids))
    state.grow(0, steps)
    item = plan(model.config, replace(request, prompt=None, max_new_tokens=steps))
    for _ in prefill(model, state, 0, item):
        pass
    place(state, 0, item)
    state.step.zero_()
    state.first_step.zero_()
    state.end_step.fill_(4 * steps + 99)  # beyond reach: no end is forced
    state.codes = torch.zeros(1, 4 * steps + 100, rows.shape[1], dtype=torch.int32, device=device)
    state.prompt_codes = torch.full((1, *rows.shape), FREE, dtype=torch.int32, device=device)
    state.prompt_codes[0] = rows.to(device)
    logits = []
    for _ in range(steps):
        model.decode_step(state)
        logits.append(state.logits.float().cpu())
    return torch.stack(logits, 1)


@contextmanager
def on(model: DiaModel, ops: ModuleType) -> Iterator[DiaModel]:
    """Put the model on another op set, for so long."""
    own, model.ops = model.ops, ops
    try:
        yield model
    finally:
        model.ops = own


def check_graphs(model: DiaModel, steps: int, capture: Any = "auto") -> tuple[str, str]:
    """Compare a captured step with the launches it was made of, to the bit. Raises if it cannot be captured."""
    capture = choose_capture(capture, model)
    if capture is None:
        return "unchecked", f"with these ops there are no graphs on {model.device.type}"
    asked = requests(model.config, steps, 1.2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        captured = speak(model, asked, capture)
    for warning in warned:
        # The engine warns and goes on without graphs: launches would be compared with themselves.
        if issubclass(warning.category, RuntimeWarning) and "could not be captured" in str(warning.message):
            raise RuntimeError(str(warning.message))
    same = all(torch.equal(a, b) for a, b in zip(captured, speak(model, asked, None), strict=True))
    return ("ok", "the same codes") if same else ("wrong", "other codes than launches")


def check_tokens(model: DiaModel, torch_ops: ModuleType, steps: int, temperature: float) -> tuple[str, str]:
    """fp32: whether the codes are those of torch; temperature: 0 for greedy ones."""
    asked = requests(model.config, steps, temperature)
    ours = speak(model, asked, "auto")
    with on(model, torch_ops):
        return _equal(ours, speak(model, asked, None), "torch")


def check_transformers(model: DiaModel, steps: int) -> tuple[str, str]:
    """fp32: whether greedy codes are those of transformers; unchecked where that does not run."""
    if find_spec("transformers") is None:
        return "unchecked", "transformers is not installed"
    asked = [replace(request, prompt=None) for request in requests(model.config, steps, 0.0)]
    ours = speak(model, asked, "auto")
    try:
        theirs = _their_codes(model, asked, steps)
    except Exception as error:
        return "unchecked", f"transformers does not run: {_said(error)}"
    counts = [min(len(a), len(b)) for a, b in zip(ours, theirs, strict=True)]
    mine, other = ([codes[:count] for codes, count in zip(side, counts, strict=True)] for side in (ours, theirs))
    return _equal(mine, other, "transformers")


def _their_codes(model: DiaModel, asked: Sequence[Request], steps: int) -> list[Tensor]:
    from bench.tools.pairs import their_rows, theirs_sharing

    theirs = []
    for request in asked:
        [rows] = their_rows(
            theirs_sharing(model), model.config, [request.text_ids], max_new_tokens=steps,
            guidance_scale=request.guidance_scale, top_k=request.top_k,
        )  # fmt: skip
        theirs.append(rows.cpu())
    return theirs


def check_logits(model: DiaModel, weights: dict[str, Tensor], torch_ops: ModuleType, steps: int) -> tuple[str, str]:
    """16 bits: the error of the logits against the same weights in fp32, beside that of torch in the same dtype."""
    request = requests(model.config, steps, 0.0)[1]
    channels, codes = model.config.decoder.num_channels, model.config.decoder.eos_token_id
    rows = torch.arange(steps * channels).view(steps, channels) * 97 % codes
    ours = forced_logits(model, request, rows)
    with on(model, torch_ops):
        plain = forced_logits(model, request, rows)
    exact = DiaModel(model.config, torch_ops).load({name: weight.float() for name, weight in weights.items()})
    wanted = forced_logits(exact, request, rows)
    error, allowed = (float((side - wanted).abs().max()) for side in (ours, plain))
    budget = 2 * allowed + torch.finfo(model.dtype).eps / 2 * float(wanted.abs().max())
    detail = f"largest error {error:.3g} of {budget:.3g} allowed; torch's is {allowed:.3g}"
    return ("ok" if error <= budget else "wrong"), detail  # a NaN is wrong


def check(
    config: DiaConfig, dtype: torch.dtype, ops: ModuleType, device: torch.device, steps: int
) -> Iterator[Finding]:
    """Everything for one dtype, each finding as soon as it is made; what raises is one too, and the others go on."""
    torch_ops, name = get_ops("torch", device), str(dtype).removeprefix("torch.")
    try:
        weights = weights_for(config, dtype, device)
        model = DiaModel(config, ops).load(weights)
    except Exception as error:
        yield Finding(name, "all", "failed", _said(error))
        return
    checks: dict[str, Callable[[], tuple[str, str]]] = {"graphs": partial(check_graphs, model, steps)}
    if dtype == torch.float32:
        checks["greedy tokens"] = partial(check_tokens, model, torch_ops, steps, 0.0)
        checks["sampled tokens"] = partial(check_tokens, model, torch_ops, steps, 1.2)
        checks["transformers"] = partial(check_transformers, model, steps)
    else:
        checks["logits"] = partial(check_logits, model, weights, torch_ops, steps)
    for what, run in checks.items():
        try:
            outcome, detail = run()
        except Exception as error:
            outcome, detail = "failed", _said(error)
        yield Finding(name, what, outcome, detail)


def _said(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def _equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], whose: str) -> tuple[str, str]:
    differ = sum(int((a != b).sum()) if a.shape == b.shape else a.numel() for a, b in zip(ours, theirs, strict=True))
    total = sum(codes.numel() for codes in ours)
    return ("wrong" if differ else "ok"), f"{differ} of {total} codes differ from {whose}'s"


def shallow(layers: int) -> DiaConfig:
    """Dia-1.6B with fewer layers."""
    config = DiaConfig()
    encoder = replace(config.encoder, num_hidden_layers=layers)
    return replace(config, encoder=encoder, decoder=replace(config.decoder, num_hidden_layers=layers))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (the GPU if there is one)")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    add_options(parser)
    options = parser.parse_args(arguments)
    wrong = False
    try:
        device = use(choose_device(options.device))
        dtypes = [choose_dtype(name, device) for name in options.dtypes]
        ops = get_ops(options.backend, device)
        results = Results(parser, options, arguments, device)
        for dtype in dtypes:
            for finding in check(shallow(options.layers), dtype, ops, device, options.steps):
                wrong |= finding.outcome in ("wrong", "failed")
                print(f"{finding.dtype:9} {finding.what:14} {finding.outcome:10} {finding.detail}", flush=True)
                case = {"dtype": finding.dtype, "what": finding.what}
                results.add(case, {"outcome": finding.outcome, "detail": finding.detail})
    except (DiaFastError, ValueError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    return results.end(int(wrong))


if __name__ == "__main__":
    sys.exit(main())
