"""Self-speculation: a few layers draft, all of them verify in one pass. The codes are those of plain greedy decoding.

python -m examples.research.self_speculation [--model demo] [--layers 0 1 3 4] [--drafts 3] [--steps 120]

Source: Zhang et al. 2023, "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding".
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast import Dia
from dia_fast.engine import Request, Session
from dia_fast.text.tokenizer import encode_text


@dataclass(frozen=True)
class Speculation:
    """Codes of both ways, and the numbers and seconds of their steps."""

    plain: Tensor
    speculated: Tensor
    steps: int
    passes: int
    drafted: int
    accepted: int
    plain_seconds: float
    seconds: float


def draft(session: Session, count: int, layers: Sequence[int]) -> Tensor:
    """Sample `count` steps ahead with some of the layers, and go back: `[count, batch, channels]`."""
    before, drafts = session.save(), []
    for _ in range(count):
        session.step(layers)
        drafts.append(session.tensors.sampled.clone())
    session.restore(before)
    return torch.stack(drafts)


def main(arguments: Sequence[str] | None = None) -> Speculation:
    """Speak in both ways; print and return what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 3, 4], help="that draft")
    parser.add_argument("--drafts", type=int, default=3, help="for each pass")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    model = Dia.from_pretrained(options.model, codec=None).model
    request = Request(encode_text("[S1] Please open the red door."), None, options.steps, temperature=0.0, seed=7)

    plain, start, steps = Session(model, [request]), time.perf_counter(), 0
    while not plain.done:
        plain.step()
        steps += 1
    plain_seconds = time.perf_counter() - start

    session, start, passes, accepted = Session(model, [request]), time.perf_counter(), 0, 0
    while not session.done:
        verified = session.verify(draft(session, options.drafts, options.layers))
        accepted += int(verified.agreed.cumprod(0).sum())
        passes += 1
    seconds = time.perf_counter() - start

    codes = [one.results()[0].delayed_codes for one in (plain, session)]
    drafted = passes * options.drafts
    print(f"plain: {steps} steps, {plain_seconds:.2f} s")
    print(f"speculated: {passes} passes, {accepted} of {drafted} drafts accepted, {seconds:.2f} s")
    print(f"{plain_seconds / seconds:.2f} times as fast; the codes are equal: {torch.equal(*codes)}")
    return Speculation(codes[0], codes[1], steps, passes, drafted, accepted, plain_seconds, seconds)


if __name__ == "__main__":
    main()
