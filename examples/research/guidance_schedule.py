"""A guidance scale that changes from step to step, each request with a schedule of its own.

python -m examples.research.guidance_schedule [--model demo] [--steps 120]
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from dia_fast import Dia
from dia_fast.engine import Engine, Hooks, Request, StepTensors
from dia_fast.text.tokenizer import encode_text

LENGTH = 256  # steps of a schedule; its last scale holds on


def follow(step: StepTensors) -> None:
    """Set each request's scale for this step. A scale of 1 is a step without guidance, NaN leaves the request's own."""
    made = (step.step - step.first_step - 1).clamp(0, LENGTH - 1)
    scale = step.extras["schedule"].gather(1, made[:, None].to(torch.int64))[:, 0]
    step.guidance_scale.copy_(torch.where(scale.isnan(), step.guidance_scale, scale))


SCHEDULE = Hooks(in_step=follow, extras={"schedule": torch.full((LENGTH,), torch.nan)})


def falling(first: float, last: float, steps: int) -> Tensor:
    """Return a schedule that falls in a straight line over some steps."""
    share = (torch.arange(LENGTH) / steps).clamp(max=1.0)
    return first + (last - first) * share


def main(arguments: Sequence[str] | None = None) -> list[Tensor]:
    """Speak with several schedules in one batch; return the codes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    model = Dia.from_pretrained(options.model, codec=None).model
    schedules = {"its own": None, "3 always": falling(3.0, 3.0, 1), "5 to 1.5": falling(5.0, 1.5, 60)}
    text = encode_text("[S1] Please open the red door.")
    with Engine(model, hooks=SCHEDULE) as engine:
        handles = [
            engine.submit(
                Request(text, None, options.steps, 3.0, seed=7, extras=None if one is None else {"schedule": one})
            )
            for one in schedules.values()
        ]
        codes = [handle.result().frames for handle in handles]
    for name, frames in zip(schedules, codes, strict=True):
        print(f"{name}: {len(frames)} frames")
    return codes


if __name__ == "__main__":
    main()
