"""The loop: steps of AdamW over a data set, evaluated, logged and saved so that a kill loses nothing but time."""

import contextlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dia_fast.checkpoint.loading import Checkpoint
from dia_fast.errors import InputError, NumericError
from dia_fast.model.device import DTYPES, choose_ops
from dia_fast.model.model import DiaModel
from dia_fast.training.batch import Batch, Example, build_batch, disturb_codes, drop_conditions
from dia_fast.training.data import Dataset, drawn, generator
from dia_fast.training.forward import batch_loss
from dia_fast.training.lora import LoRA, make_adapters
from dia_fast.training.options import TrainOptions
from dia_fast.training.run import Run
from dia_fast.utils.ambient import isolated

_CALM = "Lower the learning rate, or lengthen the warm-up"
Report = Callable[[dict[str, Any]], None]


class Trainer:
    """A model in training: its trained weights, its optimizer, and steps over data.

    Everything random follows from the seed and the number of the step alone, so that the state of a run is the trained
    weights and the optimizer's moments, and nothing else.
    """

    @isolated()
    def __init__(
        self, checkpoint: Checkpoint, options: TrainOptions, device: torch.device, backend: str = "auto"
    ) -> None:
        """Load the checkpoint onto the device: float32 if its weights are trained, else in the options' dtype."""
        self.options, self.device, self.config = options, device, checkpoint.config
        self.dtype = DTYPES[options.dtype]
        ops = choose_ops(backend, device)
        held = self.dtype if options.lora_rank else torch.float32
        self.model = DiaModel(checkpoint.config, ops).load(checkpoint.load(held, device))
        self.adapters: dict[str, LoRA] = {}
        if options.lora_rank:
            alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
            made = make_adapters(self.config, options.lora_targets, options.lora_rank, alpha, options.seed)
            self.adapters = {name: adapter.to(device) for name, adapter in made.items()}
        else:
            self.model.requires_grad_(True)
        channels = self.config.decoder.num_channels
        weights = options.channel_weights or (1.0,) * channels
        if len(weights) != channels:
            raise InputError(f"channel_weights has {len(weights)} numbers; the model has {channels} channels")
        self.channel_weights = torch.tensor(weights, device=device, dtype=torch.float32)
        self.trained = self._trained()
        self.optimizer = self._optimizer()

    @isolated(grad=True)
    @torch.enable_grad()
    def step(self, number: int, dataset: Dataset) -> dict[str, Any]:
        """Take one step, counted from 1; return its line of the log.

        Raises:
            NumericError: If the loss is no number.
        """
        started, rate = time.perf_counter(), self.options.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mean, norm, labels, channels = self._gradient(number, dataset)
        self.optimizer.step()
        return {
            "step": number,
            "loss": mean,
            "channels": channels,
            "rate": rate,
            "norm": norm,
            "labels": labels,
            "seconds": round(time.perf_counter() - started, 4),
        }

    def _gradient(self, number: int, dataset: Dataset) -> tuple[float, float, int, list[float]]:
        """Compute the gradient of a step; return loss, norm, labels, and the loss by channel. Raises NumericError."""
        batches = [batch.to(self.device) for batch in self._batches(number, dataset.examples)]
        weight = sum((batch.counts() * self.channel_weights).sum() for batch in batches)
        self.optimizer.zero_grad(set_to_none=True)
        total = sums = counts = torch.zeros((), device=self.device, dtype=torch.float32)
        for batch in batches:
            loss = self._loss(batch)
            (loss.total / weight).backward()
            total, sums, counts = total + loss.total.detach(), sums + loss.sums, counts + loss.counts
        limit = self.options.clip or float("inf")
        size = torch.nn.utils.clip_grad_norm_(self.trained.values(), limit)
        # All numbers at once: each transfer would wait for the GPU. float64 holds every count, and the losses' bits.
        numbers = [total / weight, size, counts.sum(), *(sums / counts.clamp(min=1))]
        mean, norm, labels, *channels = torch.stack([number.double() for number in numbers]).tolist()
        if not (math.isfinite(norm) and math.isfinite(mean)):
            raise NumericError(
                f"training diverged at step {number}: the loss is {mean}, the norm of its gradient {norm}. {_CALM}"
            )
        return mean, norm, int(labels), channels

    @isolated()
    def evaluate(self, number: int, dataset: Dataset) -> dict[str, Any]:
        """The loss on held-out examples, with their texts; the line of the log after step `number`."""
        total = weight = sums = counts = torch.zeros((), device=self.device, dtype=torch.float32)
        for examples in _alike(dataset.examples, self.options.batch_size):
            loss = self._loss(build_batch(examples, self.config).to(self.device))
            total, weight = total + loss.total, weight + loss.weight
            sums, counts = sums + loss.sums, counts + loss.counts
        if not torch.isfinite(total):
            raise NumericError(f"training diverged at step {number}: the loss after it is {float(total)}. {_CALM}")
        return {
            "step": number,
            "eval_loss": float(total / weight),
            "eval_channels": (sums / counts.clamp(min=1)).tolist(),
        }

    @isolated(grad=True)
    @torch.enable_grad()
    def check(self, number: int, dataset: Dataset, *, thoroughly: bool) -> None:
        """Raise NumericError if a step has left weights that are no numbers, which only the next one would see.

        thoroughly: compute that one's gradient, too, and throw it away: for the last step.
        """
        for name, tensor in self.trained.items():
            if not torch.isfinite(tensor.detach()).all():
                raise NumericError(f"training diverged at step {number}: {name} holds NaN or infinity. {_CALM}")
        if thoroughly:
            try:
                self._gradient(number + 1, dataset)
            except NumericError as error:
                raise NumericError(str(error).replace(f"step {number + 1}", f"step {number}")) from None
            self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`(trained weights by name, the optimizer's state)`, the tensors themselves, not copies."""
        return {name: tensor.detach() for name, tensor in self.trained.items()}, self.optimizer.state_dict()

    @isolated()
    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            InputError: If it is of another model.
        """
        shapes = {name: tensor.shape for name, tensor in self.trained.items()}
        if shapes != {name: tensor.shape for name, tensor in weights.items()}:
            raise InputError("the saved state is of another model: it has other weights")
        for name, tensor in self.trained.items():
            tensor.copy_(weights[name])
        self.optimizer.load_state_dict(optimizer)

    def _loss(self, batch: Batch) -> Any:
        return batch_loss(
            self.model,
            batch,
            dtype=self.dtype,
            channel_weights=self.channel_weights,
            adapters=self.adapters,
            recompute=self.options.recompute,
        )

    def _batches(self, number: int, examples: Sequence[Example]) -> Iterator[Batch]:
        """The batches of a step: its examples, those of like length together, some without their text or codes."""
        options = self.options
        size = options.batch_size * options.accumulate
        chosen = [examples[i] for i in drawn(len(examples), (number - 1) * size, number * size, options.seed)]
        draws, others = (generator(options.seed, f"{what} of step {number}") for what in ("texts", "codes"))
        for part in _alike(chosen, options.batch_size):
            batch = drop_conditions(build_batch(part, self.config), options.drop_text, draws)
            yield disturb_codes(batch, options.drop_codes, self.config, others)

    def _trained(self) -> dict[str, Tensor]:
        if not self.adapters:
            return dict(self.model.named_parameters())
        return {f"{name}.{part}": getattr(self.adapters[name], part) for name in self.adapters for part in "ab"}

    def _optimizer(self) -> torch.optim.AdamW:
        """Weight decay pulls at matrices; not at norms, nor at embeddings, of which most rows rest in most steps."""
        free = [name for name, tensor in self.trained.items() if tensor.ndim < 2 or name.endswith(".embedding")]
        groups = [
            {
                "params": [t for n, t in self.trained.items() if n not in free],
                "weight_decay": self.options.weight_decay,
            },
            {"params": [self.trained[name] for name in free], "weight_decay": 0.0},
        ]
        betas = self.options.beta1, self.options.beta2
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)


def train_steps(
    trainer: Trainer, run: Run, training: Dataset, held_out: Dataset, report: Report = lambda line: None
) -> None:
    """Take the steps that are left of a run, log, evaluate and save.

    Args:
        report: Called with every line of the log. Ctrl-C and SIGTERM end it after the current step with a saved state
            and KeyboardInterrupt; a second Ctrl-C ends it at once.
    """
    options, first = run.options, run.last_step
    if first:
        state = run.load(first)
        trainer.restore(state["weights"], state["optimizer"])

    def log(line: dict[str, Any]) -> None:
        run.log(line)
        report(line)

    with _deterministic(trainer.device), _stopping() as stopped:
        if not first and held_out.examples:
            log(trainer.evaluate(0, held_out))
        for number in range(first + 1, options.steps + 1):
            log(trainer.step(number, training))
            last = number == options.steps
            if held_out.examples and (last or number % options.eval_every == 0):
                log(trainer.evaluate(number, held_out))
            if last or number % options.save_every == 0 or stopped():
                trainer.check(number, training, thoroughly=last)
                run.save(number, *trainer.state())
            if stopped() and not last:
                raise KeyboardInterrupt


def _alike(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Groups of at most `size`, of similar length each: less padding."""
    ordered = sorted(examples, key=lambda example: len(example.codes))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into an answer to the function it yields; the second Ctrl-C works as ever."""
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield lambda: False
        return
    before = {kind: signal.signal(kind, remember) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Ask torch for kernels on a GPU that give the same bits every time, where it has such; a CPU's do anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    module: Any = torch.utils.deterministic
    filled = module.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    module.fill_uninitialized_memory = False  # a help for debugging that costs time
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("once", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        module.fill_uninitialized_memory = filled
