"""One copy of the weights for two models: those of transformers become views into what the engine reads.

The engine wants q, k and v of a layer in one tensor, k and v of cross-attention in another; everything else lies in
both libraries alike and is shared as it is. So packing moves a sixth of the weights, tensor by tensor, and what it
needs beside them is the one tensor in work.
"""

import weakref
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.dia import modeling_dia

from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.fused_weights import fused_shapes, fused_slices
from dia_fast.model.model import DiaModel, Stack

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

    Raises:
        CheckpointError: For one that dia-fast does not compute.
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
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    packed, members_of = {}, _members(model, config)
    for target, shape in fused_shapes(config).items():
        members = members_of[target]
        if share:
            # A view would turn a tensor of inference mode into one that has to be counted.
            movable = all(uses[id(parameter)] == 1 and not parameter.is_inference() for parameter in members)
            packed[target] = _joined(members, shape, movable)
        else:
            packed[target] = torch.cat([member.detach() for member in members])
    return packed


def _members(model: DiaForConditionalGeneration, config: DiaConfig) -> dict[str, list[nn.Parameter]]:
    """The parameters that make up each packed weight, from its first row on."""
    named = {
        f"{name}.{key}": parameter
        for name, module in computing(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    parts: dict[str, list[tuple[int, nn.Parameter]]] = defaultdict(list)
    for name, (target, first, _) in fused_slices(config).items():
        parts[target].append((first, named[name]))
    return {
        target: [parameter for _, parameter in sorted(items, key=lambda item: item[0])]
        for target, items in parts.items()
    }


def renew(model: DiaForConditionalGeneration, ours: DiaModel) -> None:
    """Compute again, in place, all that a model on shared weights has as copies or has derived from them.

    Nothing tells of every write: fused optimizers and `parameter.data` move no version counter.
    """
    packed = ours.state_dict()
    for target, members in _members(model, ours.config).items():
        whole, row = packed[target], 0
        if whole.data_ptr() == members[0].data_ptr():
            continue
        for member in members:
            whole[row : row + len(member)].copy_(member)
            row += len(member)
    ours.finalize_constants()


def rotate_alike(model: DiaForConditionalGeneration, ours: DiaModel) -> None:
    """Make the rotation tables anew, in place, from the frequencies that the model has now."""
    pairs: tuple[tuple[Any, Stack], ...] = ((model.model.encoder, ours.encoder), (model.model.decoder, ours.decoder))
    for theirs, stack in pairs:
        for module in theirs.modules():
            if isinstance(module, modeling_dia.DiaRotaryEmbedding):
                rows = torch.arange(len(stack.cos), dtype=torch.float32, device="cpu")
                angles = rows[:, None] * module.inv_freq.detach().cpu().float()
                stack.cos.copy_(angles.cos() * module.attention_scaling)
                stack.sin.copy_(angles.sin() * module.attention_scaling)


def fingerprint(model: DiaForConditionalGeneration) -> list[int]:
    """A checksum of every parameter's bytes, for copies that cannot be compared."""
    return [
        zlib.crc32(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for parameter in model.parameters()
    ]


def altered(model: DiaForConditionalGeneration, config: DiaConfig) -> str | None:
    """The first number of a module that the engine has as a constant and that is another one now, in words, or None."""
    for name, module in model.named_modules():
        decoder = name.startswith("model.decoder")
        expected: dict[str, Any] = {}
        if isinstance(module, modeling_dia.DiaRMSNorm):
            expected = {"variance_epsilon": (config.decoder if decoder else config.encoder).norm_eps}
        elif isinstance(module, modeling_dia.DiaSelfAttention | modeling_dia.DiaCrossAttention):
            expected = {"scaling": 1}
        elif isinstance(module, nn.Embedding):
            expected = {"max_norm": None}
        for key, value in expected.items():
            if getattr(module, key) != value:
                return f"{name}.{key} is {getattr(module, key)}, and the engine computes with {value}"
    offsets = model.model.decoder.embeddings.offsets.tolist()
    if offsets != [channel * config.decoder.vocab_size for channel in range(config.decoder.num_channels)]:
        return "model.decoder.embeddings.offsets differ from the channels' places in the vocabulary"
    return None


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


class Watch:
    """Notices what has become of a model since it was packed: weights that lie elsewhere, other modules, hooks.

    New values in the old places are not its business: see `renew` and `fingerprint`.
    """

    def __init__(self, model: DiaForConditionalGeneration) -> None:
        named = list(model.named_modules())
        self._modules = [(name, module, tuple(module._modules.values())) for name, module in named[1:]]
        self._top = weakref.ref(model), tuple(model._modules.values())  # which owns this
        self._computing = _identities(model)
        self._state = _state(model)

    def changed(self, model: DiaForConditionalGeneration) -> bool:
        """Tell whether parameters have been moved or replaced."""
        return self._rebuilt(model) or _state(model) != self._state

    def obstacle(self, patched: Collection[Any]) -> str | None:
        """Name what makes the engine compute something else, or None.

        Args:
            patched: Forward methods that are ours.
        """
        top = self._top[0]()
        assert top is not None
        for name, module in (("", top), *((name, module) for name, module, _ in self._modules)):
            if any(
                not _captures(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            ):
                return f"{name or 'the model'} has forward hooks, which the engine would not call"
            forward = module.__dict__.get("forward")
            # A compiled forward computes what the plain one does; transformers leaves the plain one behind at times.
            if forward is None or hasattr(forward, "_torchdynamo_orig_callable"):
                continue
            if getattr(forward, "__func__", None) not in (*patched, type(module).forward):
                return f"{name or 'the model'} has had its forward method replaced"
        return None

    def _rebuilt(self, model: DiaForConditionalGeneration) -> bool:
        if tuple(model._modules.values()) != self._top[1] or _identities(model) != self._computing:
            return True
        return any(tuple(module._modules.values()) != children for _, module, children in self._modules)


def _captures(hook: Any) -> bool:
    """Tell whether a hook is one that transformers leaves behind after `output_attentions`; it changes nothing."""
    return str(getattr(hook, "__module__", "")) == "transformers.utils.output_capturing"


def computing(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a call of the model runs, by name, as `named_modules`.

    A PEFT layer that leaves all work to the layer that it wraps, since its adapters are merged or disabled, is passed
    over for that layer.
    """
    base = model._modules.get("base_layer")
    flags = getattr(model, "merged", None), getattr(model, "disable_adapters", None)
    # Neither (adapters are at work) and both (the next call unmerges them) are states that the layer itself serves.
    if base is not None and flags in ((True, False), (False, True)):
        yield from computing(base, name)
        return
    yield name, model
    for key, child in model._modules.items():
        if child is not None:
            yield from computing(child, f"{name}.{key}" if name else key)


def _identities(model: nn.Module) -> list[int]:
    return [id(module) for _, module in computing(model)]


def foreign_module(model: DiaForConditionalGeneration) -> str | None:
    """The first module whose arithmetic the engine does not know, in words, or None."""
    # Where the package kernels is installed, transformers 5.0 makes the rotation a module, which every attention holds.
    functions = {nn.SiLU, type(ACT2FN["silu"]), type(modeling_dia.apply_rotary_pos_emb)}
    parameters: list[nn.Parameter] = []
    for name, module in computing(model):
        if module is not model and type(module) not in _KNOWN | functions:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"{name} is a {kind}, which the engine does not compute (merge adapters, leave weights unquantised)"
        others = [key for key, value in module._parameters.items() if key != "weight" and value is not None]
        for other in others:
            return f"{name} has a parameter {other!r}, which the engine does not read"
        parameters += [parameter for parameter in module._parameters.values() if parameter is not None]
    kinds = {parameter.dtype for parameter in parameters}
    places = {parameter.device for parameter in parameters}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float16, torch.bfloat16}:
        return f"weights are of {', '.join(sorted(map(str, kinds)))}; all must be float32, float16 or bfloat16"
    if len(places) > 1 or {place.type for place in places} == {"meta"}:
        return f"weights lie on {', '.join(sorted(map(str, places)))}; all must lie on one device"
    return None


def _state(model: DiaForConditionalGeneration) -> list[tuple[int, int, torch.dtype]]:
    """(identity, address, dtype) of every parameter."""
    return [(id(parameter), parameter.data_ptr(), parameter.dtype) for parameter in model.parameters()]
