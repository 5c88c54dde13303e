"""The matrices of a model, replaced by what the op set multiplies fastest (see the op `pack`)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dia_fast.errors import InputError

if TYPE_CHECKING:
    from dia_kernels.reference import PackedWeight

_MOST_WORKERS = 4  # each holds one matrix in float32


def pack_matrices(model: nn.Module, pack: "Callable[[Tensor], Tensor | PackedWeight]", show_progress: bool) -> bool:
    """Replaces every matrix that is multiplied by what `pack` makes of it; returns whether any has changed.

    The tensor of a matrix is let go as soon as it is replaced, so that memory stays at one copy and what is in work.
    """
    from tqdm import tqdm

    places = [
        (module, name)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 2 and name != "embedding"
    ]

    def replace(place: tuple[nn.Module, str]) -> bool:
        module, name = place
        weight = module.get_parameter(name).detach()
        packed = pack(weight)
        if packed is weight:
            return False
        delattr(module, name)
        setattr(module, name, packed)
        return True

    changed = False
    with (
        ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_WORKERS)) as pool,
        # disable=None: only where somebody may be looking, a terminal
        tqdm(total=len(places), desc="packing weights", disable=None if show_progress else True, leave=False) as bar,
    ):
        for replaced in pool.map(replace, places):
            changed |= replaced
            bar.update()
    if changed:
        for module in {module for module, _ in places}:
            module.register_state_dict_pre_hook(_refuse_state_dict)
            module.register_load_state_dict_pre_hook(_refuse_state_dict)
    return changed


def refuse_packed(what: str) -> None:
    """Raises InputError: a packed model has no tensors to do that with."""
    raise InputError(
        f"the model is packed for inference and its matrices cannot be {what}: load it again and do not call "
        "DiaModel.pack (Dia.from_pretrained calls it for 16-bit weights on a CPU)"
    )


def _refuse_state_dict(*_: Any) -> None:
    refuse_packed("read or replaced")
