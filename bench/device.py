"""The device that a benchmark runs on, and its clock: the one thing that tests replace to run without a GPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measure import describe_machine, use
from dia_fast.model.device import choose_device

HOLD_CYCLES = 400_000  # of a GPU's clock, some 0.2 ms: what the host needs to queue a few dozen launches
_LARGEST_CACHE = 32 << 20  # bytes; where a processor does not say


class Device:
    """A CPU, or a GPU of torch's `cuda` kind. Everything else in `bench.suite` is the same for both.

    calls: what a span is divided by, so that pytest-benchmark's figures are those of one call.
    """

    def __init__(self, device: torch.device) -> None:
        self.torch = use(device)
        self.gpu = device.type == "cuda"
        self.calls = 1

    @property
    def name(self) -> str:
        """Name of the device in reports; nothing that identifies the machine."""
        return describe_machine(self.torch)

    @property
    def cache_bytes(self) -> int:
        """Size of the last cache before the memory."""
        if self.gpu:
            return int(torch.cuda.get_device_properties(self.torch).L2_cache_size)
        sizes = [_bytes(file.read_text()) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(sizes, default=_LARGEST_CACHE)

    def now(self) -> "Moment":
        """Return this moment in the device's time: on a GPU an event behind all work queued. The host goes on."""
        if not self.gpu:
            return Moment(self, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.torch))
        return Moment(self, event)

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two marks of `now`, both reached."""
        if not self.gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def hold(self) -> None:
        """Keep a GPU busy while the host queues what is to be timed: no launch is waited for within a span."""
        if self.gpu:
            torch.cuda._sleep(HOLD_CYCLES)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.torch)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that repeats the launches of `work` as a graph, without the host. Raises as torch does."""
        from dia_fast.engine.decode_graphs import CudaGraphs

        return CudaGraphs()(work)


class Moment:
    """A mark of a device's clock. `end - start` is the seconds between two, for each of `device.calls` calls.

    pytest-benchmark subtracts what its timer returns, and asks for nothing else.
    """

    def __init__(self, device: Device, mark: Any) -> None:
        self.device, self.mark = device, mark

    def __sub__(self, start: "Moment") -> float:
        return self.device.elapsed(start.mark, self.mark) / self.device.calls


@dataclass(frozen=True)
class Peaks:
    """Rates that the device reaches on the simplest of work: bytes read and operations of a product, per second."""

    bandwidth: float
    compute: float


def measure_peaks(device: Device, dtype: torch.dtype, quick: bool = False) -> Peaks:
    """Bandwidth of reading a buffer far larger than the cache, and speed of a large matrix product in `dtype`.

    The best of five spans each; on a GPU a span holds several calls. On a CPU, products of 16-bit weights are summed
    in float32 and compared with a product in float32.
    """
    repeats = 8 if device.gpu else 1
    size = (2 << 30) if device.gpu else max(8 * device.cache_bytes, 1 << 28) // (4 if quick else 1)
    buffer = torch.ones(size // 4, device=device.torch)
    bandwidth = size / _best(device, buffer.sum, repeats)
    del buffer
    width = 8192 if device.gpu else 512 if quick else 1536
    wide = dtype if device.gpu else torch.float32
    a, b = (torch.randn(width, width, device=device.torch).to(wide) for _ in range(2))
    return Peaks(bandwidth, 2 * width**3 / _best(device, lambda: torch.mm(a, b), repeats))


def _best(device: Device, call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call: the shortest of five spans, after one that warms up."""
    device.calls, spans = repeats, []
    for _ in range(6):
        device.hold()
        start = device.now()
        for _ in range(repeats):
            call()
        spans.append(device.now() - start)
    device.calls = 1
    return min(spans[1:])


def _bytes(size: str) -> int:
    """Of "512K", "32768K" or "1M"."""
    text = size.strip()
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)


def open_device(name: str | None) -> Device:
    """Return the device to measure on: the one named, or the GPU if there is one. Raises InputError."""
    return Device(choose_device(name))
