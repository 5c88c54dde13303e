"""Guidance in the first steps only: what it saves, and how long the codes stay those of full guidance.

python -m examples.research.guidance_first_steps [--model demo] [--guided 30] [--steps 120]
"""

import argparse
import time
from collections.abc import Sequence

from dia_fast import Dia
from dia_fast.engine import Engine, Generation, Hooks, Request, StepTensors
from dia_fast.text.tokenizer import encode_text


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Generation, int]]:
    """Speak with both; return for each what was said and how many batch rows were computed for it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--guided", type=int, default=30, help="steps with guidance")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    model = Dia.from_pretrained(options.model, codec=None).model
    text, rows = encode_text("[S1] Please open the red door."), 0

    def count(step: StepTensors, numbers: tuple[int, ...]) -> None:
        nonlocal rows
        rows += len(step.logits)

    said: dict[str, tuple[Generation, int]] = {}
    with Engine(model, max_batch=1, hooks=Hooks(after_step=count)) as engine:
        for name, guided in {"all steps": None, f"{options.guided} steps": options.guided}.items():
            rows, start = 0, time.perf_counter()
            request = Request(text, None, options.steps, seed=7, guidance_steps=guided)
            generation = engine.submit(request).result()
            said[name] = generation, rows
            print(f"{name}: {rows} rows, {time.perf_counter() - start:.2f} s")
    whole, part = (generation.delayed_codes for generation, _ in said.values())
    length = min(len(whole), len(part))
    differs = (whole[:length] != part[:length]).any(1).nonzero().flatten().tolist()
    print(f"the codes are the same up to step {differs[0] - 1 if differs else length - 1}")
    return said


if __name__ == "__main__":
    main()
