"""A launch: arguments as a compiled kernel sees them, programs in the chosen order, errors with their place."""

import functools
import importlib
import inspect
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as base
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.tools.interpreter import schedule, state
from bench.tools.interpreter.builder import Handle
from bench.tools.interpreter.defects import KernelDefect, Unsupported
from bench.tools.interpreter.language import Language
from bench.tools.interpreter.memory import describe, tag, tensor_of

_OWN = str(Path(__file__).parent)
_TRITON = str(Path(triton.__file__).parent)
_LARGEST_GRID = (2**31 - 1, 65535, 65535)


@functools.cache
def _options() -> frozenset[str]:
    """Names of the compile options of the GPU backends that come with Triton."""
    names = {"grid", "warmup", "debug"}
    for module, options in (("nvidia", "CUDAOptions"), ("amd", "HIPOptions")):
        compiler = importlib.import_module(f"triton.backends.{module}.compiler")
        names |= {field.name for field in fields(getattr(compiler, options))}
    return frozenset(names)


class Executor(base.GridExecutor):
    """Runs an interpreted kernel over its grid."""

    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        """Launch. Raises KernelDefect for what a GPU would not catch, InterpreterError for any other error."""
        names = inspect.getfullargspec(self.fn).args
        unknown = set(kwargs) - set(names) - _options()
        if unknown:
            raise Unsupported(
                f"{self.fn.__name__} has no argument, and Triton no option, called {', '.join(sorted(unknown))}"
            )
        given = {name: value for name, value in kwargs.items() if name in names}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, given)
        for hook in self.pre_run_hooks:
            hook(*args_hst, **kwargs_hst)
        launch = state.Launch(self.fn.__name__, [], schedule.generator())
        outer, state.current = state.current, launch
        try:
            with Language():
                raw = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
                args = {
                    name: x if name in self.constexprs else self._converted(name, x, launch) for name, x in raw.items()
                }
                grid = self._checked(self.grid(args) if callable(self.grid) else self.grid)
                base.interpreter_builder.set_grid_dim(*grid)
                schedule.run(grid, launch, functools.partial(self._program, args))
        finally:
            state.current = outer
        self._restore_args_dev(args_dev, args_hst, given, kwargs_hst)

    def _checked(self, grid: Any) -> tuple[int, int, int]:
        sizes = tuple(int(n) for n in grid) + (1,) * (3 - len(grid))
        if len(sizes) != 3 or any(not 0 <= n <= most for n, most in zip(sizes, _LARGEST_GRID, strict=True)):
            raise Unsupported(f"grid: {tuple(grid)} of {self.fn.__name__} is beyond what GPUs launch, {_LARGEST_GRID}")
        return sizes

    def _converted(self, name: str, value: Any, launch: state.Launch) -> Any:
        """Return the argument inside the kernel: typed scalars, pointers that know their tensor."""
        if isinstance(value, (bool, np.bool_)):
            return tl.tensor(Handle(np.array([value], np.bool_), tl.int1), tl.int1)
        if isinstance(value, int):
            dtype = tl.int32 if -(2**31) <= value < 2**31 else tl.int64 if value < 2**63 else tl.uint64
            return tl.tensor(Handle(np.array([value], base._get_np_dtype(dtype)), dtype), dtype)
        if isinstance(value, float):
            return tl.tensor(Handle(np.array([value], np.float32), tl.float32), tl.float32)
        if isinstance(value, tuple):
            parts = [self._converted(f"{name}[{i}]", part, launch) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        converted = base._implicit_cvt(value)
        tensor = tensor_of(value.base if isinstance(value, TensorDescriptor) else value)
        if tensor is not None:
            handle = converted.handle.base if isinstance(value, TensorDescriptor) else converted.handle
            handle.data = tag(handle.data, len(launch.arguments))
            launch.arguments.append(describe(name, tensor))
        return converted

    def _program(self, args: dict[str, Any]) -> None:
        try:
            with np.errstate(all="ignore"):
                self.fn(**args)
        except Exception as error:
            cause, place = _innermost(error)
            where = f"{self.fn.__name__}, program {state.program.index}{place}"
            kind = type(cause) if isinstance(cause, KernelDefect) else InterpreterError
            detail = str(cause) if isinstance(cause, KernelDefect) else repr(cause)
            raise kind(f"{where}: {detail}") from error


def _innermost(error: BaseException) -> tuple[BaseException, str]:
    """Return the first cause, and the last line of a kernel that was reached."""
    frames: list[traceback.FrameSummary] = []
    while True:
        frames.extend(traceback.extract_tb(error.__traceback__))
        if error.__cause__ is None:
            break
        error = error.__cause__
    lines = [f for f in frames if not f.filename.startswith((_OWN, _TRITON)) and "numpy" not in f.filename]
    return error, f", {Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else ""
