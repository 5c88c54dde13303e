"""The matrices of a model that are kept in 8 bits (`dia_kernels.reference.quantized`), by the names of `weights=`."""

from collections.abc import Mapping

from torch import Tensor

from dia_fast.errors import InputError, shown
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from dia_kernels.reference import PackedWeight
from dia_kernels.reference.quantized import quantize

FLOAT, INT8, INT8_MLP = "float", "int8", "int8-mlp"
WEIGHTS = (FLOAT, INT8, INT8_MLP)
_MLP = ("gate_up", "down", "head")


def check_weights(weights: str | None) -> None:
    """Raise InputError for a name that is none of `WEIGHTS`; None stands for what a checkpoint holds."""
    if weights is not None and (not isinstance(weights, str) or weights not in WEIGHTS):
        raise InputError(f"weights {shown(weights)} is unknown; use one of {', '.join(WEIGHTS)}")


def quantized_names(config: DiaConfig, weights: str) -> tuple[str, ...]:
    """The fused weights that are in 8 bits.

    Embeddings are looked up and norms are small: they never are. `"int8"` takes all projections and the heads,
    `"int8-mlp"` those of the MLPs and the heads, which leaves attention, whose scale is 1.0, as it is.
    """
    if weights == FLOAT:
        return ()
    matrices = [name for name, shape in fused_shapes(config).items() if len(shape) == 2 and not is_table(name)]
    return tuple(name for name in matrices if weights == INT8 or name.rpartition(".")[2] in _MLP)


def rounded(fused: Mapping[str, Tensor], config: DiaConfig, weights: str) -> dict[str, Tensor | PackedWeight]:
    """The fused weights of a model, those of `quantized_names` in 8 bits."""
    names = set(quantized_names(config, weights))
    return {name: quantize(weight) if name in names else weight for name, weight in fused.items()}


def is_table(fused: str) -> bool:
    """True for an embedding."""
    return fused.endswith("embedding")
