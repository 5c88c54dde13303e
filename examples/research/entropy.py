"""Entropy of the model's prediction, for each channel: added up on the device while several requests run.

python -m examples.research.entropy [--model demo] [--steps 120]
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from dia_fast import Dia
from dia_fast.engine import Engine, Hooks, Request, StepTensors
from dia_fast.text.tokenizer import encode_text

TEXTS = ("[S1] Please open the red door.", "[S1] The number is two. [S2] Yes, thank you.")


class Entropies:
    """Sums of entropies in nats, `[requests, channels]`, and the number of steps in each. Nothing waits for the device.

    The sums of a request are an extra: they move with its row. After each step they are copied, on the device, to the
    place of the request.
    """

    def __init__(self, requests: int, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(requests, channels, device=device)
        self.steps = torch.zeros(requests, 1, device=device)
        self.hooks = Hooks(
            in_step=self.add,
            after_step=self.keep,
            extras={"sums": torch.zeros(channels), "steps": torch.zeros(1)},
        )

    def add(self, step: StepTensors) -> None:
        """Runs in the graph."""
        logs = step.cond.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        active = step.active[:, None]
        step.extras["sums"].add_(entropy.where(active, 0.0))
        step.extras["steps"].add_(active)

    def keep(self, step: StepTensors, numbers: tuple[int, ...]) -> None:
        """Runs on the host; its copies are launched behind the step."""
        rows = step.number[: len(numbers)]
        self.sums.index_copy_(0, rows, step.extras["sums"][: len(numbers)])
        self.steps.index_copy_(0, rows, step.extras["steps"][: len(numbers)])

    def means(self) -> Tensor:
        """Return the mean of each request and channel, on the host: this waits."""
        return (self.sums / self.steps).cpu()


def main(arguments: Sequence[str] | None = None) -> Tensor:
    """Speak and print; return the means, `[requests, channels]`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    model = Dia.from_pretrained(options.model, codec=None).model
    found = Entropies(len(TEXTS), model.config.decoder.num_channels, model.device)
    with Engine(model, hooks=found.hooks) as engine:
        handles = [engine.submit(Request(encode_text(text), None, options.steps, seed=7)) for text in TEXTS]
        for handle in handles:
            handle.result()
    means = found.means()
    for text, row in zip(TEXTS, means.tolist(), strict=True):
        print(text, *(f"{value:.2f}" for value in row))
    return means


if __name__ == "__main__":
    main()
