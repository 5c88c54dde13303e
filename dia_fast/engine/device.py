"""The narrow layer between the engine and a device: streams, events and copies.

Whatever the engine launches goes to one stream of its own, in order. An `Event` tells when everything launched before
it has ended. `HostDevice` is a CPU, `CudaDevice` a GPU; tests have a third one, with a clock of its own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the order of what was launched."""

    def done(self) -> bool:
        """Tell without waiting whether the device has come this far."""

    def wait(self) -> None:
        """Wait until it has."""


class Device(Protocol):
    """All that the engine asks of a device.

    torch: where tensors go. poll_every: steps between two reports, see `polling`.
    """

    torch: torch.device
    poll_every: int

    def active(self) -> AbstractContextManager[Any]:
        """Make the device and the engine's stream the current ones for a block."""

    def launch(self, step: Callable[[], None]) -> None:
        """Launch one decode step."""

    def event(self) -> Event:
        """Mark the present end of the stream."""

    def caller_mark(self) -> Any:
        """Mark the end of the caller's own stream, for `follow`; None if there is nothing to wait for."""

    def follow(self, mark: Any) -> None:
        """Let what is launched from now on come after a `caller_mark`."""

    def staging(self, *shape: int) -> Tensor:
        """An int32 buffer on the host that copies go to without anyone waiting."""

    def to_host(self, source: Tensor, target: Tensor) -> None:
        """Copy to a `staging` buffer, in order; it is there when a later event is done."""

    def upload(self, values: Tensor) -> Tensor:
        """A copy of host values on the device, without waiting for the device."""

    def now(self) -> float:
        """Seconds of a steady clock."""


class _Done:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class HostDevice:
    """A CPU: whatever is launched has ended when the call returns."""

    poll_every = 1
    _end = _Done()

    def __init__(self, device: torch.device) -> None:
        self.torch = device

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def launch(self, step: Callable[[], None]) -> None:
        step()

    def event(self) -> Event:
        return self._end

    def caller_mark(self) -> Any:
        return None

    def follow(self, mark: Any) -> None:
        pass

    def staging(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="cpu")

    def to_host(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def upload(self, values: Tensor) -> Tensor:
        return values.to(self.torch)

    def now(self) -> float:
        return time.monotonic()


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


class CudaDevice:
    """One GPU, whichever is current, and a stream of its own on it."""

    poll_every = 2

    def __init__(self, device: torch.device) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        with torch.cuda.device(self.torch):
            self.stream = torch.cuda.Stream()
        self.follow(self.caller_mark())  # the weights may still be on their way

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.device(self.torch), torch.cuda.stream(self.stream):
            yield

    def launch(self, step: Callable[[], None]) -> None:
        step()

    def event(self) -> Event:
        return _CudaEvent(self.stream)

    def caller_mark(self) -> Any:
        stream = torch.cuda.current_stream(self.torch)
        return None if stream == self.stream else stream.record_event()

    def follow(self, mark: Any) -> None:
        if mark is not None:
            self.stream.wait_event(mark)

    def staging(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=True, device="cpu")

    def to_host(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.torch, non_blocking=True)

    def now(self) -> float:
        return time.monotonic()


def device_for(device: torch.device) -> Device:
    """Choose the layer for a device of torch."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice(device)
