"""Plugins for runs of the benchmark suite in a process of its own: a device that needs no GPU, and a broken kernel.

`-p tests.helpers.planted` makes `bench.device.open_device` give a device whose clock is a counter, lets the kernels of
Triton run in the repaired interpreter, and leaves out the last program of every launch that `DIA_PLANTED` names.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from typing import Any

import torch

from bench import device
from bench.suite import backends
from bench.tools.interpreter import install
from dia_kernels import launcher as launch

TICK = float(os.environ.get("DIA_TICK", "0.001"))


class CountingDevice(device.Device):
    """A CPU to torch; every look at the clock is one tick after the one before."""

    ticks = 0
    cache_bytes = 1
    name = "counting device"

    def now(self) -> device.Moment:
        CountingDevice.ticks += 1
        return device.Moment(self, self.ticks)

    def elapsed(self, start: Any, end: Any) -> float:
        return (end - start) * TICK


def launch_all_but_the_last(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    if kernel.fn.__name__ == os.environ.get("DIA_PLANTED"):
        grid = (grid[0] - 1, *grid[1:])
    return kernel[grid](*args, **meta)


install()
launch._active = launch_all_but_the_last
device.open_device = lambda name: CountingDevice(torch.device("cpu"))
backends.obstacle = lambda backend, device: None
