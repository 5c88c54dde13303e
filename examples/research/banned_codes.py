"""Banned codes: each request has codes of its own that it must not say.

python -m examples.research.banned_codes [--model demo] [--steps 120]
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from dia_fast import Dia
from dia_fast.engine import Engine, Hooks, Request, StepTensors
from dia_fast.text.tokenizer import encode_text


def ban(step: StepTensors) -> None:
    """Put the banned codes out. What guidance makes of minus infinity is minus infinity."""
    step.cond.masked_fill_(step.extras["banned"], -torch.inf)


def main(arguments: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Speak, ban the most frequent code of each channel, and speak again; return the codes of both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    model = Dia.from_pretrained(options.model, codec=None).model
    decoder = model.config.decoder
    nothing = torch.zeros(decoder.num_channels, decoder.vocab_size, dtype=torch.bool)
    text = encode_text("[S1] Please open the red door.")
    with Engine(model, hooks=Hooks(in_step=ban, extras={"banned": nothing})) as engine:
        free = engine.submit(Request(text, None, options.steps, seed=7)).result().frames
        frequent = free.mode(0).values
        banned = nothing.clone()
        banned[torch.arange(decoder.num_channels), frequent] = True
        held = engine.submit(Request(text, None, options.steps, seed=7, extras={"banned": banned})).result().frames
    for channel, code in enumerate(frequent.tolist()):
        counts = [int((frames[:, channel] == code).sum()) for frames in (free, held)]
        print(f"channel {channel}: code {code} {counts[0]} times, banned {counts[1]} times")
    return free, held


if __name__ == "__main__":
    main()
