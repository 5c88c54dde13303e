"""Keep the caller's settings of torch out of our work: a result depends on arguments alone.

Autocast, gradients, inference mode and the default device belong to a thread, and are put back when the block ends.
The precision of matrix products belongs to the process: it is at its highest while any block is open. The default dtype
belongs to the process too and cannot be set for a while without others noticing, so every allocation names its dtype.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from dia_fast.utils import forks
from dia_fast.utils.out_of_memory import out_of_memory

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")
_lock = threading.Lock()
_open, _precision = 0, "highest"
_convolving = 0
_put_back: Callable[[], None] = lambda: None  # noqa: E731
_here = threading.local()  # blocks that this thread has open


class isolated:
    """Run a block or a function by settings of its own: no autocast, default device CPU, exact matrix products.

    Results are ordinary tensors, never inference tensors. Where memory runs out, OutOfMemory is raised. A class, since
    every decode step enters it and a generator costs twice the time.

    Args:
        grad: Leave gradients as the caller has them. By default none are recorded.
        default_device: False leaves the default device as it is. For code in which every allocation names one: to ask
            for it takes longer than all else here.
    """

    def __init__(self, *, grad: bool = False, default_device: bool = True) -> None:
        self._grad, self._default_device = grad, default_device
        self._exact = self._gradients = False
        self._stack: contextlib.ExitStack | None = None

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            with isolated(grad=self._grad, default_device=self._default_device):
                return function(*args, **kwargs)

        return inner

    def __enter__(self) -> None:
        forks.check_threads()
        try:
            usual = _is_usual(self._default_device)
            _begin_exact()
            self._exact = True
            if not usual:
                self._stack = _unusual(self._grad)
            elif not self._grad and torch.is_grad_enabled():
                self._gradients = True
                torch.set_grad_enabled(False)
        except BaseException:
            self._put_back()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()
        if isinstance(error, MemoryError | RuntimeError):
            told = out_of_memory(error)
            if told is not None and told is not error:
                raise told from error

    def _put_back(self) -> None:
        try:
            if self._stack is not None:
                stack, self._stack = self._stack, None
                stack.close()
            if self._gradients:
                torch.set_grad_enabled(True)
                self._gradients = False
        finally:
            if self._exact:
                self._exact = False
                _end_exact()


def _is_usual(default_device: bool) -> bool:
    """Tell if nothing but gradients may have to be set."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or (default_device and not getattr(_here, "open", 0) and torch.get_default_device().type != "cpu")
    )


def _unusual(grad: bool) -> contextlib.ExitStack:
    """Set what is not as usual; closing what is returned puts it back."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            if grad:  # leaving inference mode would switch gradients on, which inference mode had off
                stack.enter_context(torch.no_grad())
        if not grad and torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        return stack.pop_all()


def _begin_exact() -> None:
    """Have float32 matrix products in float32 until `_end_exact` was called as often."""
    global _open, _precision
    with _lock:
        if not _open:
            _precision = torch.get_float32_matmul_precision()
            if _precision != "highest":
                torch.set_float32_matmul_precision("highest")
        _open += 1
    _here.open = getattr(_here, "open", 0) + 1


def _end_exact() -> None:
    """The last one puts the caller's choice back."""
    global _open
    _here.open -= 1
    with _lock:
        _open -= 1
        if not _open and _precision != "highest":
            torch.set_float32_matmul_precision(_precision)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Float32 convolutions in float32 while any block is open: on a GPU torch takes TF32 unless it is told not to.

    They belong to the process, as matrix products do. Networks without convolutions are spared the price of asking.
    """
    global _convolving, _put_back
    with _lock:
        if not _convolving:
            _put_back = _switch_tf32_off()
        _convolving += 1
    try:
        yield
    finally:
        with _lock:
            _convolving -= 1
            if not _convolving:
                _put_back()


def _switch_tf32_off() -> Callable[[], None]:
    """Return what puts the caller's choice back."""
    backend: Any = torch.backends.cudnn
    try:
        allowed = backend.allow_tf32
    except RuntimeError:  # torch's newer switch has been used, and refuses to answer for the older one
        precision, backend.conv.fp32_precision = backend.conv.fp32_precision, "ieee"
        return lambda: setattr(backend.conv, "fp32_precision", precision)
    if not allowed:
        return lambda: None
    backend.allow_tf32 = False
    return lambda: setattr(backend, "allow_tf32", True)


def _in_child() -> None:
    """After a fork: the blocks of other threads have gone with them."""
    global _lock, _open, _convolving
    if _convolving:
        _put_back()
        _convolving = 0
    _lock, there, _open = threading.Lock(), _open, getattr(_here, "open", 0)
    if there and not _open and _precision != "highest":
        torch.set_float32_matmul_precision(_precision)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
