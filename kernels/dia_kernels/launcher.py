"""Launch and configure every kernel: the one place where tests, codegen report and traffic meter listen."""

import difflib
import errno
import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Every op: all take their configuration from here, and may therefore stand in a table.
OPS = frozenset(
    {
        "codebook_logits", "cross_attention", "embed_codes", "glu", "linear_residual", "ragged_attention", "rms_norm",
        "rms_norm_glu", "rms_norm_linear", "rope", "rope_attention", "sample", "snake",
    }
)  # fmt: skip

_registered: set[str] = set()

LARGEST_TABLE = 1 << 24  # characters

Launcher = Callable[..., Any]
Listener = Callable[[Launcher, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], Any]
DefaultConfig = Callable[..., dict[str, int]]
Table = dict[str, list[dict[str, Any]]]

CONFIGS = Path(__file__).parent / "configs"
# Compute capabilities that have a table; another one takes the next below it, one below them all the first.
_CAPABILITIES = (80, 90, 100, 120)
# Values that `where` may name: others fit no launch. The examples are offered for one that is misspelt.
_NAMED = {"arch": re.compile(r"sm_\d{2,3}|gfx\d[0-9a-f]{2,4}|interpreter"), "dtype": re.compile(r"b?float16|float32")}
_EXAMPLES = {
    "arch": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100",
             "gfx1201", "interpreter"),
    "dtype": ("bfloat16", "float16", "float32"),
}  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    return kernel[grid](*args, **meta)


_active: Launcher = _launch


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    """Launch `kernel` over `grid`; `meta` are constexpr arguments and compile options."""
    return _active(kernel, grid, *args, **meta)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(launch, kernel, grid, args, meta)` in place of each launch; it may call `launch` or not.

    Listeners nest: `launch` is what would have happened without this one.
    """
    global _active
    outer = _active
    _active = lambda kernel, grid, *args, **meta: listener(outer, kernel, grid, args, meta)  # noqa: E731
    try:
        yield
    finally:
        _active = outer


def architecture(device: torch.device) -> str:
    """Return the name of the target that kernels for `device` are compiled for: `sm_90`, `gfx942` or `interpreter`."""
    import triton

    if triton.knobs.runtime.interpret:
        return "interpreter"
    arch = triton.runtime.driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else str(arch)


def configuration(
    op: str, default: DefaultConfig, dtype: torch.dtype, device: torch.device, **shape: int
) -> dict[str, int]:
    """Return block sizes and compile options for one launch of `op`.

    The first entry of the table named by `DIA_KERNELS_TABLE` (JSON, see `read_table`) that fits the launch is laid over
    the default. Cached; nothing here measures or touches the device.

    Args:
        op: Name of the op, one of `OPS`.
        default: Pure function `default(dtype, architecture, **shape)` that returns the default config.
        dtype: Of the activations.
        device: Of the tensors.
        **shape: Sizes that the config may depend on, and that an entry may name.

    Raises:
        ValueError: The table cannot be read, or an entry names a fact or a constant that the op does not have.
    """
    return dict(_configuration(op, default, dtype, architecture(device), os.environ.get("DIA_KERNELS_TABLE"), **shape))


@functools.lru_cache(maxsize=4096)
def _configuration(
    op: str, default: DefaultConfig, dtype: torch.dtype, arch: str, table: str | None, **shape: int
) -> dict[str, int]:
    chosen = default(dtype, arch, **shape)
    use = find_entry(Path(table), op, facts(dtype, arch, **shape)) if table else None
    if use is None:
        return chosen
    unknown = set(use) - set(chosen)
    if unknown:
        raise ValueError(f"{table}: {op}: 'use' may set {', '.join(chosen)}, not {', '.join(sorted(unknown))}")
    return {**chosen, **use}


def facts(dtype: torch.dtype, arch: str, **shape: int) -> dict[str, Any]:
    """Return what an entry's `where` may name of a launch."""
    return {"dtype": str(dtype).removeprefix("torch."), "arch": arch, **shape}


def default_table(arch: str) -> Path:
    """Return the table of default configs for an architecture: its own, or that of the nearest relative."""
    if arch.startswith("gfx"):
        return CONFIGS / ("gfx942.json" if arch.startswith("gfx9") else "gfx1100.json")
    capability = int(arch[3:]) if arch.startswith("sm_") else 0
    return CONFIGS / f"sm_{max((known for known in _CAPABILITIES if known <= capability), default=80)}.json"


def find_entry(path: Path, op: str, launch: Mapping[str, Any]) -> dict[str, int] | None:
    """Return `use` of the first entry of a table that fits a launch, given by its `facts`; None if none fits.

    Raises:
        ValueError: The table cannot be read, or an entry before that one names a fact that the launch does not have.
    """
    for entry in read_table(str(path)).get(op, ()):
        where = entry.get("where", {})
        unknown = sorted(set(where) - set(launch))
        if unknown:
            raise ValueError(f"{path}: {op}: 'where' may name {', '.join(launch)}, not {', '.join(unknown)}")
        if all(_fits(launch[name], wanted) for name, wanted in where.items()):
            return entry["use"]
    return None


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return wanted.get("min", value) <= value <= wanted.get("max", value)
    return value in wanted if isinstance(wanted, list) else value == wanted


def register(op: str) -> None:
    """Let a table set the config of a kernel of your own, which takes it from `configuration` under this name."""
    if not op.isidentifier():
        raise ValueError(f"op: must be a name such as 'my_glu', not {op!r}")
    _registered.add(op)


@functools.lru_cache(maxsize=16)
def read_table(path: str) -> Table:
    """Read a table of configs: `{op: [{"where": {"arch": "sm_90", "rows": {"max": 8}}, "use": {"BLOCK_N": 8}}]}`.

    `where` names facts of the launch: `dtype`, `arch` and the op's shape. A fact is given as a value, as a list of
    values, or as `{"min": ..., "max": ...}`, ends included, either of which may be left out. A fact that is left out
    fits anything.

    Raises:
        ValueError: The file is not such a table; the message names it.
    """
    try:
        # Without waiting for a pipe of that name, nor reading a device to no end.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            table = json.loads(file.read(LARGEST_TABLE))
    except OSError as error:
        raise ValueError(f"DIA_KERNELS_TABLE: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"DIA_KERNELS_TABLE: {path}: not JSON: {error}") from error
    groups = list(table.values()) if isinstance(table, dict) else [None]
    if not all(isinstance(group, list) and all(map(_is_entry, group)) for group in groups):
        raise ValueError(f'{path}: expected {{op: [{{"where": {{...}}, "use": {{...}}}}, ...]}}')
    unknown = sorted(set(table) - OPS - _registered)
    if unknown:
        names = ", ".join(sorted(OPS | _registered))
        raise ValueError(f"{path}: knows no op {', '.join(unknown)}; there are {names}")
    for op, entries in table.items():
        for name, wanted in (item for entry in entries for item in entry.get("where", {}).items()):
            if not _is_wanted(name, wanted):
                raise ValueError(
                    f"{path}: {op}: {name} is {json.dumps(wanted)}; needs a value, a list of values or, for a size, "
                    '{"min": number, "max": number}'
                )
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if name in _NAMED and not _NAMED[name].fullmatch(value):
                    near = difflib.get_close_matches(value, _EXAMPLES[name], 1, 0.0)[0]
                    raise ValueError(f"{path}: {op}: {name} {value!r} is none that there is; did you mean {near!r}?")
    return table


def _is_entry(entry: Any) -> bool:
    parts: dict[str, Any] = {"where": {}} | entry if isinstance(entry, dict) else {}
    return set(parts) == {"where", "use"} and all(isinstance(part, dict) for part in parts.values())


def _is_wanted(name: str, wanted: Any) -> bool:
    kind = str if name in ("dtype", "arch") else int
    if isinstance(wanted, dict):
        return kind is int and set(wanted) <= {"min", "max"} and all(type(end) is int for end in wanted.values())
    return all(type(value) is kind for value in (wanted if isinstance(wanted, list) else [wanted]))


def require(named: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]]) -> None:
    """Raise a ValueError that names the first tensor that is not contiguous or has another shape than given.

    named: each tensor with the shape it must have.
    """
    for name, (tensor, shape) in named.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
    require_contiguous(**{name: tensor for name, (tensor, _) in named.items()})


def require_contiguous(**tensors: torch.Tensor) -> None:
    """Raise a ValueError that names the first tensor whose layout is not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: has strides {tensor.stride()} for shape {tuple(tensor.shape)}; pass .contiguous()"
            )
