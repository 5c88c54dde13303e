"""Tensors in files, read piece by piece into memory that somebody else owns.

Loading may hold the finished weights and little more, so nothing here ever holds a whole file: safetensors are read
with plain file reads (the pages of a memory map would count as resident), and the pages of a mapped pickle are given
back once used.
"""

import ctypes
import functools
import math
import mmap
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dia_fast.errors import CheckpointError, shown
from dia_fast.utils.files import NotingFile, open_regular, parse_json, uninterrupted

# https://github.com/huggingface/safetensors#format
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Elements at a time; large enough for fast reads and copies, small beside any real model.
CHUNK = 1 << 22
_MAX_HEADER = 100_000_000


def save_torch(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a `torch.save` file. Raises the OSError that a write has met, such as a full disk's."""
    with uninterrupted() as interrupted:  # torch makes a RuntimeError of Ctrl-C in a write
        noting = NotingFile(file, interrupted)
        try:
            torch.save(state, cast(IO[bytes], noting))
        except RuntimeError:
            noting.check()
            raise
        noting.check()


def save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file as transformers does, from tensors in memory.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error  # safetensors' own class for a full disk and the like


@dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file.

    Args:
        offset: Of its first byte in the file.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def read_into(self, out: Tensor, first: int = 0) -> None:
        """Fill `out` (contiguous, on the CPU, of the same dtype) with the elements from `first` on."""
        view = out.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} is truncated: it ends within tensor {self.name}")
                view = view[count:]

    def read(self, first: int, last: int) -> Tensor:
        """Elements `first` to `last` (exclusive) of the tensor seen as one row, in memory of their own."""
        out = torch.empty(last - first, dtype=self.dtype, device="cpu")
        self.read_into(out, first)
        return out


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a `torch.save` file, mapped into memory.

    Args:
        offset: Orders the tensors of one file.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    tensor: Tensor
    releasable: bool

    def read_into(self, out: Tensor, first: int = 0) -> None:
        """Fill `out` (contiguous, on the CPU, of the same dtype) with the elements from `first` on."""
        out = out.reshape(-1)
        for start in range(0, out.numel(), CHUNK):
            stop = min(start + CHUNK, out.numel())
            out[start:stop] = self.read(first + start, first + stop)
            self.release(first + start, first + stop)

    def read(self, first: int, last: int) -> Tensor:
        """Elements `first` to `last` (exclusive) of the tensor seen as one row: a view of the map, to be released."""
        return self.tensor.reshape(-1)[first:last]

    def release(self, first: int, last: int) -> None:
        """Give the pages of these elements back; another read would fetch them from the file again."""
        if self.releasable:
            start = self.tensor.data_ptr() + first * self.dtype.itemsize
            _release(start, start + (last - first) * self.dtype.itemsize)


StoredTensor = SafeTensor | MappedTensor


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, their contents unread.

    Raises:
        CheckpointError: Naming the file and where possible the tensor, for a file that is missing, damaged, truncated,
            of another kind, or that would run code when it is loaded.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise CheckpointError(f"{path} is {'not a file' if os.path.exists(path) else 'missing'}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            header = _read_header(path, file, size)
            start = file.tell()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = isinstance(kind, str) and all(type(n) is int and n >= 0 for n in (*shape, first, last))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path} is damaged: its entry for tensor {name} is {shown(entry)}")
        if kind not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {kind}, which cannot be read; float32 and bfloat16 can"
            )
        dtype = SAFETENSORS_DTYPES[kind]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged: tensor {name} of shape {list(shape)} and dtype {kind} has {last - first} bytes"
            )
        if start + last > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {start + last}, the file at byte {size}. "
                "Copy or download it again"
            )
        tensors[name] = SafeTensor(name, path, shape, dtype, start + first)
    try:
        with safe_open(path, "pt"):  # finds tensors that overlap, holes between them and bytes behind the last
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: its tensors do not fill it, each byte once ({error}). Copy or download it again"
        ) from None
    return tensors


def _read_header(path: Path, file: BinaryIO, size: int) -> dict[str, dict]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: its {size} bytes do not hold the header that they announce"
        )
    header = parse_json(file.read(length), f"{path} is damaged or not a safetensors file: its header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged or not a safetensors file: its header is not a JSON object")
    return header


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        with open_regular(path) as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if start != b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is refused: it is damaged, or a bare pickle, which could run code. Only the zip archives that "
            "torch.save writes since version 1.6 are read, and only when they hold nothing but tensors"
        )
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected tensors by name")
    content = _weights_of(content)
    check_stored(content, path)
    mapped = _mapped_ranges(path)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in content.items():
        start_at = tensor.data_ptr()
        stop = start_at + tensor.numel() * tensor.dtype.itemsize
        releasable = tensor.is_contiguous() and any(low <= start_at and stop <= high for low, high in mapped)
        tensors[str(name)] = MappedTensor(
            str(name), path, tuple(tensor.shape), tensor.dtype, start_at, tensor.detach(), releasable
        )
    return tensors


# What training scripts save beside an optimizer's state calls the weights by one of these names.
_WEIGHTS = ("model", "state_dict", "model_state_dict")


def _weights_of(content: dict[Any, Any]) -> dict[Any, Any]:
    """The weights in what a training script has saved, or the contents as they are."""
    return next((content[name] for name in _WEIGHTS if isinstance(content.get(name), dict)), content)


def load_pickle(path: Path) -> Any:
    """Read a `torch.save` file as data only, mapped where its format allows.

    Raises:
        CheckpointError: For a file that is damaged or that would run code. Its tensors are not checked yet.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors{f' ({wanted[1]})' if wanted else ''} and could run code "
            "when it is loaded. Get the checkpoint as safetensors, or from somebody you trust"
        ) from error
    except Exception as error:  # torch has no error class of its own for a damaged archive
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise CheckpointError(f"{path} is truncated, damaged or not a checkpoint: {reason}") from error


def check_stored(tensors: Mapping[Any, Any], path: Path) -> None:
    """Raise CheckpointError for what is no plain tensor that lies in the file, byte for byte.

    A pickle can also describe tensors without contents (meta), lists of tensors (nested), and views that repeat the
    same bytes: a file of some hundred bytes may ask for terabytes.
    """
    size, total = path.stat().st_size, 0
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            kind = type(tensor).__name__
            if isinstance(tensor, Tensor):
                kind = f"{tensor.device.type} tensor of layout {tensor.layout}{', nested' * tensor.is_nested}"
            raise CheckpointError(f"{path}: entry {shown(name)} is a {kind}; expected plain tensors by name")
        total += tensor.numel() * tensor.dtype.itemsize
        if _repeats(tensor) or total > size:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} of shape {list(tensor.shape)} is a view that repeats stored bytes; "
                f"the file has {size} bytes. Save the tensors as copies of their own"
            )


def _repeats(tensor: Tensor) -> bool:
    """True unless each element lies in a place of its own (some layouts that do are taken for ones that do not)."""
    end = 1
    for stride, count in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < end:
            return tensor.numel() > 0
        end = stride * count
    return False


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Address ranges of the mapped file. Only there may pages be dropped: elsewhere their contents would be lost."""
    if sys.platform != "linux":
        return []
    ranges = []
    real = str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == real:
            low, high = fields[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


def _release(start: int, stop: int) -> None:
    """Drop the whole pages between two addresses of a file's map from this process; the file keeps them."""
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
