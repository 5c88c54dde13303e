"""Reported speeds of Dia-1.6B, beside the bound that the memory of their GPU sets."""

from dataclasses import dataclass

from dia_fast.diagnostics.roofline import work
from dia_fast.diagnostics.roofline.devices import DEVICES, Device
from dia_fast.diagnostics.roofline.predict import SIZES, STEPS_PER_SECOND, Prediction, Workload, predict
from dia_fast.model.config import DiaConfig


@dataclass(frozen=True)
class Published:
    """One request with guidance, on one GPU. dtype: as reported; where it was not, what the report suggests."""

    device: str
    how: str
    dtype: str
    steps_per_second: float
    source: str


README = "README of nari-labs/dia, as a multiple of realtime"
USER = "a user's report"

RESULTS = (
    Published("a100", "original, compiled", "float16", 218, USER),
    Published("4090", "original, compiled", "bfloat16", 198, USER),
    Published("4090", "original, compiled", "bfloat16", 2.1 * STEPS_PER_SECOND, README),
    Published("4090", "original, eager", "bfloat16", 1.5 * STEPS_PER_SECOND, README),
    Published("4090", "original, compiled", "float32", 1.0 * STEPS_PER_SECOND, README),
    Published("h100", "original, eager", "bfloat16", 38, USER),
)


@dataclass(frozen=True)
class Comparison:
    """A published speed beside its bound and a prediction.

    Args:
        ceiling: Steps per second at which the weights alone take all of the published bandwidth.
        predicted: For these kernels, in a CUDA graph, at the context and text asked for.
    """

    result: Published
    ceiling: float
    predicted: Prediction

    @property
    def share(self) -> float:
        return self.result.steps_per_second / self.ceiling


def weight_bytes(config: DiaConfig, itemsize: int) -> int:
    """Bytes of the matrices that every step reads, whatever it serves."""
    step = work.Step(1, 1, 1, itemsize, True, 1, 1, 1)
    tiles = work.Tiles(lambda name, rows: 16, work.SELF_SPLIT, work.CROSS_SPLIT, False)
    return sum(item.times * item.weights for item in work.launches(config, step, tiles))


def compare(context: int, text: int) -> list[Comparison]:
    """Every published result, which are all of the 1.6B model, at one request of this context and text."""
    config, found = DiaConfig(), []
    for result in RESULTS:
        device: Device = DEVICES[result.device]
        ceiling = device.bandwidth / weight_bytes(config, SIZES[result.dtype])
        made = predict(device, Workload(config, result.dtype, 1, context, text))
        found.append(Comparison(result, ceiling, made))
    return found
