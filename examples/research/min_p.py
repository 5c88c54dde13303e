"""Min-p sampling: keep codes at least p times as likely as the likeliest one, each request with its own p.

python -m examples.research.min_p [--model demo] [--p 0 0.1 0.9] [--steps 120]
"""

import argparse
from collections.abc import Sequence

import torch

from dia_fast import Dia
from dia_fast.engine import Engine, Hooks, Request, StepTensors
from dia_fast.text.tokenizer import encode_text


def min_p(eos: int) -> Hooks:
    """Return hooks with an extra `min_p`. eos: the code that ends a sentence; those of sounds lie below it."""

    def keep_likely(step: StepTensors) -> None:
        """Put sounds below the limit out. A difference of logits is one of log probabilities."""
        sounds = step.cond[..., :eos]
        limit = sounds.amax(-1, keepdim=True) + step.extras["min_p"].log()[:, None, None]
        sounds.masked_fill_(sounds < limit, -torch.inf)

    return Hooks(in_step=keep_likely, extras={"min_p": torch.tensor(0.0)})


def main(arguments: Sequence[str] | None = None) -> list[torch.Tensor]:
    """Speak once for each p, in one batch; return the codes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--p", type=float, nargs="+", default=[0.0, 0.1, 0.9])
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    model = Dia.from_pretrained(options.model, codec=None).model
    text = encode_text("[S1] Please open the red door.")
    with Engine(model, hooks=min_p(model.config.decoder.eos_token_id)) as engine:
        handles = [
            engine.submit(Request(text, None, options.steps, top_k=None, top_p=1.0, seed=7, extras={"min_p": p}))
            for p in options.p
        ]
        codes = [handle.result().frames for handle in handles]
    for p, frames in zip(options.p, codes, strict=True):
        print(f"p = {p:g}: {len(frames)} frames, {len(frames.unique())} different codes")
    return codes


if __name__ == "__main__":
    main()
