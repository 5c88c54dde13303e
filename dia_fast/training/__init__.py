"""Fine-tuning: batches of text and codes, a differentiable forward over the packed weights, and a loop around it.

    from dia_fast.training import finetune

    finetune("voice", {"model": "nari-labs/Dia-1.6B-0626", "data": "recordings", "lora_rank": 16})

The names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dia_fast.training.batch import IGNORED, Batch, Example, build_batch, disturb_codes, drop_conditions
    from dia_fast.training.data import Dataset, Recording, load_dataset, read_recordings
    from dia_fast.training.fine_tuning import finetune
    from dia_fast.training.forward import Loss, batch_loss
    from dia_fast.training.options import TrainOptions
    from dia_fast.training.trainer import Trainer

_HOMES = {
    "IGNORED": "batch",
    "Batch": "batch",
    "Dataset": "data",
    "Example": "batch",
    "Loss": "forward",
    "Recording": "data",
    "TrainOptions": "options",
    "Trainer": "trainer",
    "batch_loss": "forward",
    "build_batch": "batch",
    "disturb_codes": "batch",
    "drop_conditions": "batch",
    "finetune": "fine_tuning",
    "load_dataset": "data",
    "read_recordings": "data",
}

__all__ = [
    "IGNORED",
    "Batch",
    "Dataset",
    "Example",
    "Loss",
    "Recording",
    "TrainOptions",
    "Trainer",
    "batch_loss",
    "build_batch",
    "disturb_codes",
    "drop_conditions",
    "finetune",
    "load_dataset",
    "read_recordings",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dia_fast.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dia_fast.training.{_HOMES[name]}"), name)
