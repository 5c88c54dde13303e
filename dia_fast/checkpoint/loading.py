"""Checkpoints: find one, check it against its configuration, and stream it into fused weights.

Everything that can be wrong with names, shapes, dtypes and lengths is found when a checkpoint is opened, before any
memory is taken. Loading fills the fused weights in place: the peak is those weights and one chunk.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dia_fast.checkpoint import hub
from dia_fast.checkpoint import tensor_io as tensor_files
from dia_fast.checkpoint.adapters import Adapter, base_of, is_adapter, open_adapter
from dia_fast.checkpoint.demo import located
from dia_fast.checkpoint.layouts import TensorSlice, detect_layout, is_derived, plain_names, tensor_slices
from dia_fast.checkpoint.tensor_io import MappedTensor, StoredTensor, open_tensors
from dia_fast.errors import CheckpointError, InputError, shown
from dia_fast.generation.sampling_params import SamplingParams, from_generation_config
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, parameter_count
from dia_fast.model.quantization import FLOAT, INT8, INT8_MLP, is_table, quantized_names
from dia_fast.utils.ambient import isolated
from dia_fast.utils.files import checked_path, read_json
from dia_kernels.reference import PackedWeight
from dia_kernels.reference.quantized import Int8Weight, quantize

_SCALE = "_scale"  # behind the name of a tensor in 8 bits, as in compressed-tensors
GENERATION_CONFIG = "generation_config.json"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked checkpoint; its weights are still in the files.

    Args:
        source: As the caller named it.
        layout: "transformers" or "original".
        tensors: By their name in the files.
        defaults: The sampling parameters that its generation_config.json names.
        adapter: What is added when it is loaded, or None.
        scales: Of the tensors that are in 8 bits, by the tensors' names.
    """

    source: str
    config: DiaConfig
    layout: str
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    defaults: SamplingParams = field(default_factory=SamplingParams)
    adapter: Adapter | None = None
    scales: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Of `quantization.WEIGHTS`, the one that most of the stored tensors fit."""
        if not self.scales or self.adapter is not None:
            return FLOAT
        stored = {part.fused for name, part in tensor_slices(self.config, self.layout).items() if name in self.scales}
        return INT8 if stored - set(quantized_names(self.config, INT8_MLP)) else INT8_MLP

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the stored weights have, of those that are not in 8 bits."""
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype is not torch.int8:
                counts[tensor.dtype] += torch.Size(tensor.shape).numel()
        return counts.most_common(1)[0][0]

    @property
    def parameters(self) -> int:
        """The number of weights of the model."""
        return parameter_count(self.config)

    @property
    def stored_bytes(self) -> int:
        """The size of the weights in the files, in bytes."""
        stored = [*self.tensors.values(), *self.scales.values()]
        return sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in stored)

    @isolated()
    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The fused weights by name (`fused_weights.fused_shapes`), in `dtype` (default: the stored one) on `device`.

        Raises CheckpointError if a file breaks off, for values that are NaN, infinity, or too large for `dtype`, and if
        the device has no memory left.
        """
        return self._load_tensors(fused_shapes(self.config), dtype, device)

    @isolated()
    def load_as(
        self, weights: str | None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor | PackedWeight]:
        """As `load`, some of the matrices in 8 bits, one rounded after the other: the peak is all of them and one.

        weights: of `quantization.WEIGHTS`; by default what the checkpoint holds.
        """
        names = quantized_names(self.config, weights or self.weights)
        rest = {name: shape for name, shape in fused_shapes(self.config).items() if name not in names}
        loaded: dict[str, Tensor | PackedWeight] = dict(self._load_tensors(rest, dtype, device))
        for name in names:
            loaded[name] = self.load_int8(name, device)
        return loaded

    @isolated()
    def load_int8(self, fused: str, device: torch.device | str = "cpu") -> Int8Weight:
        """One fused weight in 8 bits: as stored where it is, else rounded from the stored values."""
        parts = {n: p for n, p in tensor_slices(self.config, self.layout).items() if p.fused == fused}
        if self.adapter is not None or any(name not in self.scales for name in parts):
            weight = self.load_fused(fused)
            if wrong := not_finite(weight):
                raise CheckpointError(f"{self.source}: {wrong} values of {fused} are NaN or infinity")
            return quantize(weight.to(device))
        shape = fused_shapes(self.config)[fused]
        values = torch.empty(shape, dtype=torch.int8, device="cpu")
        scales = torch.empty(shape[0], dtype=torch.float32, device="cpu")
        for name, part in parts.items():
            _copy(self.tensors[name], part, values[part.first : part.last])
            scales[part.first : part.last] = _scales(self.scales[name])
        return Int8Weight(values.to(device), scales.to(device))

    def _load_tensors(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """`load` for some of the fused weights."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise InputError(f"weights can be loaded as {_names(DTYPES)}, not as {_name(dtype)}")
        parts = {n: part for n, part in tensor_slices(self.config, self.layout).items() if part.fused in shapes}
        try:
            fused = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        except (RuntimeError, MemoryError) as error:  # on a CPU torch has no class of its own for it
            need = self.parameters * dtype.itemsize / 2**30
            raise CheckpointError(f"{device} has no room for the weights: {need:.2f} GiB in {_name(dtype)}") from error
        for name in sorted(parts, key=lambda name: (self.tensors[name].path, self.tensors[name].offset)):
            part = parts[name]
            _copy(self.tensors[name], part, fused[part.fused][part.first : part.last], self.scales.get(name))
        for name in self.adapter.parts if self.adapter else ():
            if name not in fused:
                continue
            fused[name].copy_(self.load_fused(name))
            if wrong := not_finite(fused[name]):
                raise CheckpointError(
                    f"{self.source}: with the adapter {wrong} values of {name} are NaN or infinity in {_name(dtype)}"
                )
        return fused

    @isolated()
    def load_fused(self, fused: str, dtype: torch.dtype | None = None) -> Tensor:
        """One fused weight, on the CPU, in `dtype` (default: one that holds its stored parts exactly)."""
        parts = {n: p for n, p in tensor_slices(self.config, self.layout).items() if p.fused == fused}
        dtype = dtype or self.stored_dtype(fused)
        weight = torch.empty(fused_shapes(self.config)[fused], dtype=dtype, device="cpu")
        for name, part in parts.items():
            _copy(self.tensors[name], part, weight[part.first : part.last], self.scales.get(name))
        return weight if self.adapter is None else self.adapter.merged(fused, weight)

    def stored_dtype(self, fused: str) -> torch.dtype:
        """The dtype that holds the stored parts of a fused weight exactly."""
        parts = tensor_slices(self.config, self.layout)
        stored = [self.scales.get(name, self.tensors[name]) for name, part in parts.items() if part.fused == fused]
        dtypes = [tensor.dtype for tensor in stored]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        return dtype


@isolated()
def open_checkpoint(
    name_or_path: str | Path,
    *,
    config: DiaConfig | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Find a checkpoint and check it completely, short of reading the weights.

    Args:
        name_or_path: A folder, a file of weights (its config.json beside it, or given as `config`), `"demo"` for the
            demo voice, a folder with an adapter (see `adapters`), or the id of a repository on the Hugging Face Hub, of
            which `revision` is loaded.
        local_files_only: Do not go online.

    Raises:
        CheckpointError: For whatever is missing, damaged, unsupported or does not fit together.
    """
    source = str(name_or_path)
    path = checked_path(located(source), "name_or_path")
    if is_adapter(path):
        base = open_checkpoint(base_of(path), config=config, revision=revision, local_files_only=local_files_only)
        if base.adapter is not None:
            raise CheckpointError(f"{path}: its base {base.source} is an adapter itself; merge that one first")
        return replace(base, source=source, adapter=open_adapter(path, base.config))
    if path.exists():
        if revision is not None:
            raise InputError(f"revision {revision!r} is for repositories of the Hub, but {source} is on this machine")
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) or source.endswith(
        (".pth", ".safetensors")
    ):
        raise CheckpointError(f"{source}: no such file or folder, and not the id of a Hub repository (owner/name)")
    else:
        path = hub.download(source, find_weights, read_index, revision=revision, local_files_only=local_files_only)
    folder, entry = (path, None) if path.is_dir() else (path.parent, path.name)
    if config is None:
        if not os.path.isfile(folder / "config.json"):
            raise CheckpointError(
                f"{folder} has no config.json; it tells the sizes of the model and which generation of Dia it is"
            )
        config = DiaConfig.from_file(folder / "config.json")
    if entry is None:
        entry = find_weights(_file_names(folder), str(folder))
    names = read_index(folder / entry) if entry.endswith(".index.json") else [entry]
    files = tuple(folder / name for name in names)
    layout, kept, scales = _checked(_open_files(files), config, folder / entry)
    return Checkpoint(source, config, layout, files, kept, _defaults(folder / GENERATION_CONFIG), scales=scales)


def checkpoint_of(state: Mapping[str, Tensor], config: DiaConfig) -> Checkpoint:
    """A checkpoint of tensors in memory, by their names in either official layout.

    Raises:
        CheckpointError: For a checkpoint that cannot be used.
    """
    where = Path("state_dict")
    tensors: dict[str, StoredTensor] = {}
    for offset, (name, tensor) in enumerate(state.items()):
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where}: entry {shown(name)} is a {type(tensor).__name__}, not a tensor")
        shape, held = tuple(tensor.shape), tensor.detach()
        tensors[name] = MappedTensor(name, where, shape, tensor.dtype, offset, held, releasable=False)
    layout, kept, scales = _checked(tensors, config, where)
    return Checkpoint(str(where), config, layout, (), kept, scales=scales)


def _checked(
    tensors: dict[str, StoredTensor], config: DiaConfig, where: Path
) -> tuple[str, dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The layout of the tensors, those that make up the model by their names in it, and the scales of some of them."""
    try:
        tensors = plain_names(tensors)
        layout = detect_layout(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    scales = {name.removesuffix(_SCALE): tensors.pop(name) for name in list(tensors) if name.endswith(_SCALE)}
    parts = tensor_slices(config, layout)
    _check(tensors, parts, where, scales)
    return layout, {name: tensor for name, tensor in tensors.items() if not is_derived(name)}, scales


def _check_scale(name: str, tensor: StoredTensor, part: TensorSlice | None, scale: StoredTensor | None) -> None:
    """Raise CheckpointError for a tensor in 8 bits that cannot be read, and for scales of one that is not."""
    if scale is None:
        raise CheckpointError(f"{tensor.path}: tensor {name} is int8, but its scales, {name}{_SCALE}, are missing")
    if tensor.dtype is not torch.int8:
        raise CheckpointError(f"{scale.path}: {name}{_SCALE} is there, but tensor {name} is {_name(tensor.dtype)}")
    if part is None or part.transposed or len(part.shape) != 2 or is_table(part.fused):
        raise CheckpointError(f"{tensor.path}: tensor {name} is int8; only projections in transformers' layout can be")
    if scale.shape not in ((part.shape[0], 1), (part.shape[0],)) or scale.dtype not in DTYPES:
        raise CheckpointError(
            f"{scale.path}: {name}{_SCALE} has shape {list(scale.shape)} and dtype {_name(scale.dtype)}; expected "
            f"{[part.shape[0], 1]}, a scale for each output channel, in {_names(DTYPES)}"
        )


def _defaults(path: Path) -> SamplingParams:
    if not os.path.exists(path):
        return SamplingParams()
    data = read_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must be an object of named fields, not {type(data).__name__}")
    try:
        return from_generation_config(data)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _file_names(folder: Path) -> list[str]:
    try:
        return [item.name for item in folder.iterdir() if item.is_file()]
    except OSError as error:
        raise CheckpointError(f"cannot read the folder {folder}: {error.strerror or error}") from None


def find_weights(names: Collection[str], where: str) -> str:
    """The file of a folder or repository to load weights from: an index of shards, or the weights themselves."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        for found in (f"{name}.index.json", name):
            if found in names:
                return found
    for endings in ((".safetensors",), (".pth", ".pt", ".bin")):
        several = sorted(name for name in names if name.endswith(endings) and "/" not in name)
        if len(several) > 1:
            raise CheckpointError(f"{where} has several files of weights: {', '.join(several)}. Name the one to load")
        if several:
            return several[0]
    raise CheckpointError(f"{where} has no weights: no model.safetensors, pytorch_model.bin or *.pth")


def read_index(path: Path) -> list[str]:
    """The shards that an index names, each once, all of them in its own folder."""
    try:
        shards = sorted(set(read_json(path)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of shards: it has no readable weight_map") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path} names the shard {shown(shard)}; shards must lie in the same folder")
    return shards


def _open_files(files: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in open_tensors(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in both {tensors[name].path} and {file}")
            tensors[name] = tensor
    return tensors


def _check(
    tensors: dict[str, StoredTensor],
    parts: dict[str, TensorSlice],
    where: Path,
    scales: Mapping[str, StoredTensor],
) -> None:
    missing = [name for name in parts if name not in tensors]
    if missing:
        raise CheckpointError(f"{where}: {_list(missing)} missing, though config.json asks for it")
    extra = [name for name in tensors if name not in parts and not is_derived(name)]
    if extra:
        raise CheckpointError(f"{where}: {_list(extra)} not part of the model that config.json describes")
    if lost := [name + _SCALE for name in scales if name not in tensors]:
        raise CheckpointError(f"{where}: {_list(lost)} there without the tensors that they scale")
    for name, part in parts.items():
        tensor = tensors[name]
        if tensor.shape != part.shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"but config.json asks for {list(part.shape)}"
            )
        if tensor.dtype is torch.int8 or name in scales:
            _check_scale(name, tensor, part, scales.get(name))
        elif tensor.dtype not in (*DTYPES, torch.float64):
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has dtype {_name(tensor.dtype)}; weights must be {_names(DTYPES)}"
            )


def not_finite(weight: Tensor) -> int:
    """Count values that are NaN or infinity. Where none is, which one pass tells, nothing is allocated."""
    if not weight.numel() or all(bool(end.isfinite()) for end in weight.aminmax()):
        return 0
    return sum(int((~part.isfinite()).sum()) for part in weight.view(-1).split(tensor_files.CHUNK))


def _copy(tensor: StoredTensor, part: TensorSlice, out: Tensor, scale: StoredTensor | None = None) -> None:
    """Fill `out`, rows of a fused weight, with a stored tensor, whatever its layout, dtype and device.

    scale: of a tensor in 8 bits that is wanted in `out`'s dtype. Raises CheckpointError where values are NaN or
    infinity, or become infinity in the dtype of `out`.
    """
    _fill(tensor, part, out, None if scale is None else _scales(scale))
    if wrong := not_finite(out):
        raise CheckpointError(f"{tensor.path}: {_not_finite(tensor, wrong, out.dtype)}")


def _scales(tensor: StoredTensor) -> Tensor:
    scales = tensor.read(0, torch.Size(tensor.shape).numel()).float()
    if not_finite(scales) or not bool((scales > 0).all()):
        raise CheckpointError(f"{tensor.path}: {tensor.name} is damaged: scales must be finite and above 0")
    return scales


def _not_finite(tensor: StoredTensor, wrong: int, dtype: torch.dtype) -> str:
    """The reason why values of a tensor are not finite after reading it as `dtype`."""
    size, largest, stored = torch.Size(tensor.shape).numel(), 0.0, 0
    for first in range(0, size, tensor_files.CHUNK):
        part = tensor.read(first, min(first + tensor_files.CHUNK, size))
        good = part[part.isfinite()]
        stored += part.numel() - good.numel()
        largest = max(largest, float(good.abs().max()) if good.numel() else 0.0)
    if stored:
        return (
            f"tensor {tensor.name} is damaged: {stored} of its {size} values are NaN or infinity; get the checkpoint "
            "again"
        )
    return (
        f"{wrong} of the {size} values of tensor {tensor.name} are too large for {_name(dtype)}, which ends at "
        f"{torch.finfo(dtype).max:.5g} (the largest is {largest:.5g}); use bfloat16 or float32 instead (bf16, fp32)"
    )


def _fill(tensor: StoredTensor, part: TensorSlice, out: Tensor, scales: Tensor | None) -> None:
    if not part.transposed and tensor.dtype is out.dtype and out.device.type == "cpu":
        tensor.read_into(out)
        return
    columns = out.shape[0] if part.transposed else out.numel() // out.shape[0]
    lines = out.numel() // columns
    step = max(1, tensor_files.CHUNK // columns)
    for first in range(0, lines, step):
        last = min(first + step, lines)
        chunk = tensor.read(first * columns, last * columns).view(last - first, columns)
        if scales is not None:
            chunk = chunk.float().mul_(scales[first:last, None])
        if part.transposed:
            # Transposing a contiguous block and then placing it is twice as fast as writing across the rows.
            out[:, first:last] = chunk.to(out.device, out.dtype).T.contiguous()
        else:
            out.view(lines, columns)[first:last] = chunk
        if isinstance(tensor, MappedTensor):
            tensor.release(first * columns, last * columns)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"tensor{'s' if len(names) > 1 else ''} {shown} {'are' if len(names) > 1 else 'is'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(map(_name, dtypes))
