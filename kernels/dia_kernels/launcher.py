"""Where every kernel is launched and configured: the one place where tests, codegen report and traffic meter listen."""

import errno
import functools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# Every op: all take their configuration from here, and may therefore stand in a table.
OPS = frozenset(
    {
        "codebook_logits", "cross_attention", "embed_codes", "glu", "linear_residual", "ragged_attention", "rms_norm",
        "rms_norm_glu", "rms_norm_linear", "rope", "rope_attention", "sample", "snake",
    }
)  # fmt: skip

LARGEST_TABLE = 1 << 24  # characters

Launcher = Callable[..., Any]
Listener = Callable[[Launcher, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], Any]
Rule = Callable[..., dict[str, int]]


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    return kernel[grid](*args, **meta)


_active: Launcher = _launch


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    """Launches `kernel` over `grid`; `meta` are constexpr arguments and compile options."""
    return _active(kernel, grid, *args, **meta)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener(launch, kernel, grid, args, meta)` in place of each launch; it may call `launch` or not.

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
    """What kernels for tensors on `device` are compiled for: `sm_90`, `gfx942`, ... or `interpreter`."""
    import triton

    if triton.knobs.runtime.interpret:
        return "interpreter"
    arch = triton.runtime.driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else str(arch)


def configuration(op: str, rule: Rule, dtype: torch.dtype, device: torch.device, **shape: int) -> dict[str, int]:
    """Block sizes and compile options for one launch of `op`.

    rule: a pure function `rule(dtype, architecture, **shape)`, the default. The first entry of the table named by
    `DIA_KERNELS_TABLE` (JSON, see `read_table`) that fits the op, the dtype, the architecture and the shape is laid
    over it. Pure and cached: nothing here measures or touches the device.
    """
    return dict(_configuration(op, rule, dtype, architecture(device), os.environ.get("DIA_KERNELS_TABLE"), **shape))


@functools.lru_cache(maxsize=4096)
def _configuration(
    op: str, rule: Rule, dtype: torch.dtype, arch: str, table: str | None, **shape: int
) -> dict[str, int]:
    chosen = rule(dtype, arch, **shape)
    facts = {"dtype": str(dtype).removeprefix("torch."), "arch": arch, **shape}
    for entry in read_table(table).get(op, ()) if table else ():
        where = entry.get("where", {})
        if any(key not in facts for key in where):
            raise ValueError(
                f"{table}: {op}: 'where' may name {', '.join(facts)}, not {', '.join(set(where) - set(facts))}"
            )
        if all(facts[key] == value for key, value in where.items()):
            unknown = set(entry["use"]) - set(chosen)
            if unknown:
                raise ValueError(f"{table}: {op}: 'use' may set {', '.join(chosen)}, not {', '.join(sorted(unknown))}")
            return {**chosen, **entry["use"]}
    return chosen


@functools.lru_cache(maxsize=8)
def read_table(path: str) -> dict[str, list[dict[str, Any]]]:
    """A user's table of configurations: `{op: [{"where": {"arch": "sm_90", "rows": 1}, "use": {"BLOCK_N": 8}}]}`.

    `where` names facts of the launch (`dtype`, `arch` and the op's shape); a fact left out fits anything. Raises
    ValueError naming the file if it is not such a table.
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
    unknown = sorted(set(table) - OPS)
    if unknown:
        raise ValueError(f"{path}: knows no op {', '.join(unknown)}; there are {', '.join(sorted(OPS))}")
    return table


def _is_entry(entry: Any) -> bool:
    parts: dict[str, Any] = {"where": {}} | entry if isinstance(entry, dict) else {}
    return set(parts) == {"where", "use"} and all(isinstance(part, dict) for part in parts.values())


def require(named: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]]) -> None:
    """Raises a ValueError that names the first tensor that is not contiguous or has another shape than given.

    named: each tensor with the shape it must have.
    """
    for name, (tensor, shape) in named.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
    require_contiguous(**{name: tensor for name, (tensor, _) in named.items()})


def require_contiguous(**tensors: torch.Tensor) -> None:
    """Raises a ValueError that names the first tensor whose layout is not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: has strides {tensor.stride()} for shape {tuple(tensor.shape)}; pass .contiguous()"
            )
