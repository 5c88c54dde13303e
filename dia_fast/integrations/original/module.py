"""The model as the original package's `Dia.model` is: a module with the original's names for its tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dia_fast.checkpoint.layouts import plain_names, tensor_slices
from dia_fast.checkpoint.loading import checkpoint_of
from dia_fast.errors import CheckpointError
from dia_fast.model.config import DiaConfig
from dia_fast.model.device import choose_ops
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.utils.ambient import isolated
from dia_kernels.reference import PackedWeight


class Keys(NamedTuple):
    """Result of `load_state_dict`, as torch's own."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class OriginalModel(DiaModel):
    """`DiaModel`, whose `state_dict` and `load_state_dict` speak of the tensors that the original package has.

    config: sizes; a new one has no memory for weights. device, dtype: of the weights that will be loaded, until `to`
    says otherwise.
    """

    def __init__(self, config: DiaConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, choose_ops("auto", device))
        self._place = torch.empty(0, device=device, dtype=dtype)
        self.version = 0  # counts what has been done to the weights; 0 before there are any

    @property
    def loaded(self) -> bool:
        """True once there are weights."""
        return self.version > 0

    @isolated()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy weights in, by the original's or transformers' names, on this model's device and in its dtype.

        strict: False leaves weights that are not given as they are. Raises CheckpointError (a RuntimeError) for tensors
        that are missing, of another shape, or not finite.
        """
        if state_dict.keys() == fused_shapes(self.config).keys():
            return nn.Module.load_state_dict(self, state_dict, strict, assign)
        given, wanted = plain_names(state_dict), tensor_slices(self.config, "original")
        missing = [name for name in wanted if name not in given]
        unexpected = [name for name in given if name not in wanted]
        if not strict and (missing or unexpected):
            if missing and not self.loaded:
                raise CheckpointError(f"state_dict: {len(missing)} tensors are missing, {missing[0]} first")
            there = self.state_dict() if missing else {}
            given = there | {name: tensor for name, tensor in given.items() if name in wanted}
        self.load(checkpoint_of(given, self.config).load(self._place.dtype, self._place.device))
        return Keys([], []) if strict else Keys(missing, unexpected)

    def load(self, weights: Mapping[str, Tensor | PackedWeight]) -> "OriginalModel":
        """Take fused weights, as `DiaModel.load` does."""
        if self.packed:  # whose matrices are no tensors
            fresh = DiaModel(self.config, self.ops)
            self.encoder, self.decoder, self.packed = fresh.encoder, fresh.decoder, False
        super().load(weights)
        self.version += 1
        return self

    @isolated()
    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The weights by the original's names, as copies that may be written to any file."""
        if not self.loaded:
            raise CheckpointError("this model has no weights: load_state_dict them first")
        fused = super().state_dict()
        return {
            name: (rows.T if place.transposed else rows).reshape(place.shape).clone(
                memory_format=torch.contiguous_format
            )
            for name, place in tensor_slices(self.config, "original").items()
            for rows in (fused[place.fused][place.first : place.last],)
        }  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OriginalModel":
        """Behind `to`, `half`, `cuda` and their kin."""
        place = fn(self._place)
        if (place.device, place.dtype) == (self._place.device, self._place.dtype):
            return self
        if self.loaded:
            super()._apply(fn, recurse)
        self._place, self.ops = place, choose_ops("auto", place.device)
        if self.loaded:
            self.finalize()
            self.version += 1
        return self


def as_model(given: Any, config: DiaConfig, device: torch.device, dtype: torch.dtype) -> OriginalModel:
    """A model with the weights of what a program assigns to `Dia.model`: ours, or the original's own module."""
    given = getattr(given, "_orig_mod", given)  # of torch.compile
    if isinstance(given, OriginalModel):
        return given
    if isinstance(given, DiaModel):
        model = OriginalModel(given.config, given.device, given.dtype)
        return model.load(given.state_dict())
    state = getattr(given, "state_dict", None)
    if not callable(state):
        raise CheckpointError(f"model must be a module with the weights of Dia, not a {type(given).__name__}")
    model = OriginalModel(config, device, dtype)
    model.load_state_dict(state())
    return model
