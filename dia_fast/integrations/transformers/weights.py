"""One copy of the weights for two models: those of transformers become views into what the engine reads.

The engine wants q, k and v of a layer in one tensor, k and v of cross-attention in another; everything else lies in
both libraries alike and is shared as it is. So packing moves a sixth of the weights, tensor by tensor, and what it
needs beside them is the one tensor in work.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiaForConditionalGeneration
from transformers.models.dia import modeling_dia

from dia_fast.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.packing import packed_shapes, pieces

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_STACK = {item.name for kind in (EncoderConfig, DecoderConfig) for item in fields(kind)}
_STACK |= {"hidden_act", "rope_parameters", "rope_scaling", "rope_theta"}

# The modules whose arithmetic the engine repeats. A subclass may compute something else, so it does not count.
_KNOWN = {
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
    modeling_dia.DiaCrossAttention,
    modeling_dia.DiaDecoder,
    modeling_dia.DiaDecoderLayer,
    modeling_dia.DiaEncoder,
    modeling_dia.DiaEncoderLayer,
    modeling_dia.DiaMLP,
    modeling_dia.DiaModel,
    modeling_dia.DiaMultiChannelEmbedding,
    modeling_dia.DiaRMSNorm,
    modeling_dia.DiaRotaryEmbedding,
    modeling_dia.DiaSelfAttention,
}


def read_config(model: DiaForConditionalGeneration) -> DiaConfig:
    """The configuration of a model of transformers; fields that do not tell what Dia computes are left out.

    Raises CheckpointError for one that dia-fast does not compute.
    """
    given = model.config.to_dict()
    top = {name: given.get(name) for name in ("model_type", "delay_pattern", *_TOKENS)}
    for stack in ("encoder_config", "decoder_config"):
        top[stack] = {name: value for name, value in given[stack].items() if name in _STACK}
    return DiaConfig.from_dict(top)


def pack(model: DiaForConditionalGeneration, config: DiaConfig, share: bool = True) -> dict[str, Tensor]:
    """The packed weights by name, sharing the memory of the model's parameters, or all of them copies.

    Parameters that must lie together are moved: `parameter.data` becomes a view of the packed tensor. One that stands
    for several weights at once (tied) stays where it is and is copied.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for parameter in named.values())
    parts: dict[str, list[tuple[int, nn.Parameter]]] = defaultdict(list)
    for name, (target, first, _) in pieces(config).items():
        parts[target].append((first, named[name]))
    packed = {}
    for target, shape in packed_shapes(config).items():
        members = [parameter for _, parameter in sorted(parts[target], key=lambda item: item[0])]
        if share:
            packed[target] = _joined(members, shape, movable=all(uses[id(parameter)] == 1 for parameter in members))
        else:
            packed[target] = torch.cat([member.detach() for member in members])
    return packed


def _joined(members: Sequence[nn.Parameter], shape: tuple[int, ...], movable: bool) -> Tensor:
    """The members below each other as one tensor; they are its views already, or become them if they are movable."""
    first = members[0].detach()
    if all(member.is_contiguous() for member in members) and _adjacent(members):
        return first.as_strided(shape, [*first.stride()], first.storage_offset())
    whole = torch.cat([member.detach() for member in members])
    if movable:
        row = 0
        for member in members:
            member.data = whole[row : row + member.shape[0]]
            row += member.shape[0]
    return whole


def _adjacent(members: Sequence[nn.Parameter]) -> bool:
    start, end = members[0].untyped_storage().data_ptr(), members[0].data_ptr()
    for member in members:
        if member.untyped_storage().data_ptr() != start or member.data_ptr() != end:
            return False
        end += member.numel() * member.element_size()
    return True


def shared_bytes(model: DiaForConditionalGeneration, packed: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes of the packed weights that are the model's own memory, bytes that are a copy)."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = [(tensor.untyped_storage().data_ptr() in own, tensor.nbytes) for tensor in packed.values()]
    return sum(size for mine, size in sizes if mine), sum(size for mine, size in sizes if not mine)


class Watch:
    """Notices what has become of a model since it was packed: other weights, other modules, hooks.

    `changed` sees whatever torch counts: optimizer steps, `load_state_dict`, in-place operations, `.to()`. It does not
    see writes through `parameter.data`.
    """

    def __init__(self, model: DiaForConditionalGeneration) -> None:
        self._modules = [(name, module, tuple(module._modules.values())) for name, module in model.named_modules()]
        self._state = _state(model)

    def changed(self, model: DiaForConditionalGeneration) -> bool:
        """Whether parameters have been written, moved or replaced."""
        return self._rebuilt() or _state(model) != self._state

    def obstacle(self, patched: Collection[Any]) -> str | None:
        """Why the engine would not compute what the model does, or None. patched: forward methods that are ours."""
        for name, module, _ in self._modules:
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'the model'} has forward hooks, which the engine would not call"
            forward = module.__dict__.get("forward")
            # A compiled forward computes what the plain one does; transformers leaves the plain one behind at times.
            if forward is None or hasattr(forward, "_torchdynamo_orig_callable"):
                continue
            if getattr(forward, "__func__", None) not in (*patched, type(module).forward):
                return f"{name or 'the model'} has had its forward method replaced"
        return None

    def _rebuilt(self) -> bool:
        return any(tuple(module._modules.values()) != children for _, module, children in self._modules)


def foreign_module(model: DiaForConditionalGeneration) -> str | None:
    """The first module whose arithmetic the engine does not know, in words, or None."""
    activation = {type(module.activation_fn) for module in model.modules() if isinstance(module, modeling_dia.DiaMLP)}
    for name, module in model.named_modules():
        if module is not model and type(module) not in _KNOWN | activation:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"{name} is a {kind}, which the engine does not compute (merge adapters, leave weights unquantised)"
        others = [key for key, value in module._parameters.items() if key != "weight" and value is not None]
        for other in others:
            return f"{name} has a parameter {other!r}, which the engine does not read"
    kinds = {parameter.dtype for parameter in model.parameters()}
    places = {parameter.device for parameter in model.parameters()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float16, torch.bfloat16}:
        return f"weights are of {', '.join(sorted(map(str, kinds)))}; all must be float32, float16 or bfloat16"
    if len(places) > 1 or {place.type for place in places} == {"meta"}:
        return f"weights lie on {', '.join(sorted(map(str, places)))}; all must lie on one device"
    return None


def _state(model: DiaForConditionalGeneration) -> list[tuple[int, int, int]]:
    """(identity, address, number of writes) of every parameter."""
    return [
        (id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    ]
