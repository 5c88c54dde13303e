"""Everything that decides what a run learns, in one record that is stored beside it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dia_fast.errors import InputError

TARGETS = ("qkv", "o", "cross_q", "cross_kv", "cross_o", "gate_up", "down")
"""The packed weights of a layer that LoRA can adapt: attention, cross-attention, MLP."""

FREE = ("eval_every", "save_every", "keep")
"""These change how often a run is looked at, not what it learns: they may differ when it is resumed."""

_SHORT = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run.

    Args:
        model: The checkpoint to begin with; see `Dia.from_pretrained`.
        codec: See `Dia.from_pretrained`.
        data: See `read_recordings`; without eval_data, `eval_share` of the data is held out.
        eval_data: As `data`.
        steps: Optimizer steps, each of `batch_size * accumulate` examples.
        learning_rate: At its peak, by default 1e-5, or 1e-4 for LoRA; it rises over `warmup` steps and falls along a
            cosine to `final_share` of the peak.
        clip: Largest norm of the gradient, 0 for any.
        drop_text: Probability that an example comes without its text, for guidance.
        drop_codes: Probability that the decoder reads a random code in the place of the right one, from which it learns
            to go on after a bad one.
        channel_weights: Of the loss, one per channel.
        lora_rank: 0 trains all weights.
        lora_alpha: By default twice the rank.
        dtype: Of activations and matrix products, and of weights that are not trained; what is trained is always
            float32.
        recompute: Less memory for a third more time.
        eval_every: In steps.
        save_every: In steps.
        keep: How many states to keep for resuming.

    Raises:
        InputError: Naming the option, for a value that cannot work.
    """

    model: str
    data: str
    codec: str = "auto"
    eval_data: str | None = None
    eval_share: float = 0.05
    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: int = 50
    final_share: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    drop_text: float = 0.1
    drop_codes: float = 0.0
    channel_weights: tuple[float, ...] | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = TARGETS
    dtype: str = "float32"
    seed: int = 0
    recompute: bool = False
    skip_bad: bool = False
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every", "keep"):
            self._integer(name, 1)
        for name in ("warmup", "seed", "lora_rank"):
            self._integer(name, 0)
        for name in ("eval_share", "drop_text", "drop_codes", "beta1", "beta2"):
            self._number(name, 0, 1, open_end=True)
        for name in ("final_share", "weight_decay"):
            self._number(name, 0, 1)
        self._number("clip", 0, math.inf)
        for name in ("learning_rate", "lora_alpha"):
            if getattr(self, name) is not None:
                self._number(name, 0, math.inf, open_start=True)
        unknown = [target for target in self.lora_targets if target not in TARGETS]
        if unknown or not self.lora_targets:
            raise InputError(f"lora_targets: {unknown or 'none'}; choose from {', '.join(TARGETS)}")
        weights = self.channel_weights
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
            raise InputError(f"channel_weights must be numbers of at least 0, not all 0; got {list(weights)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {self.dtype!r}; training computes in float32 or bfloat16 (fp32, bf16)")

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.lora_rank else 1e-5

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.peak * (self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainOptions":
        """From what a command line or a JSON file gives: lists for tuples, short names of dtypes."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown options: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        values = dict(values)
        for name in ("channel_weights", "lora_targets"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        values["dtype"] = _SHORT.get(values.get("dtype", "float32"), values.get("dtype", "float32"))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that `from_dict` reads and JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")

    def _number(self, name: str, low: float, high: float, *, open_start: bool = False, open_end: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            above = value > low if open_start else value >= low
            if above and (value < high if open_end else value <= high):
                return
        start = f"above {low:g}" if open_start else f"at least {low:g}"
        end = "" if high == math.inf else f" and {'below' if open_end else 'at most'} {high:g}"
        raise InputError(f"{name} must be {start}{end}, got {value!r}")
