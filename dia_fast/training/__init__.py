"""Fine-tuning: batches of text and codes, a differentiable forward over the packed weights, and a loop around it."""

from dia_fast.training.batch import IGNORED, Batch, Example, build_batch, drop_conditions
from dia_fast.training.forward import Loss, batch_loss

__all__ = ["IGNORED", "Batch", "Example", "Loss", "batch_loss", "build_batch", "drop_conditions"]
