"""Published figures of GPUs, and reading the same from a user's file."""

import difflib
import math
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dia_fast.errors import InputError, shown
from dia_fast.utils.files import read_json


@dataclass(frozen=True)
class Device:
    """A GPU as far as a prediction needs it.

    target: what its kernels are compiled for; units: SMs, CUs, or on RDNA pairs of CUs; bandwidth: bytes/s of memory;
    clock: Hz; matrix, vector: floating-point operations per second, 16-bit matrix instructions with float32 sums and no
    sparsity, and float32; cache, cache_bandwidth: the last level of cache, bytes and bytes/s; latency: seconds of a
    load from memory; memory: bytes. source: of the published figures; cache_bandwidth and latency are assumed where it
    does not name them.
    """

    key: str
    name: str
    target: str
    units: int
    bandwidth: float
    clock: float
    matrix: float
    vector: float
    cache: float
    cache_bandwidth: float
    latency: float
    memory: float
    source: str

    @property
    def warp_size(self) -> int:
        return 64 if self.target.startswith("gfx9") else 32

    @property
    def issue(self) -> float:
        """Warp instructions per clock and unit; on CDNA a 64-wide one takes a quarter of the unit for four clocks."""
        return 1 if self.target.startswith("gfx9") else 4

    @property
    def chained(self) -> bool:
        """Tell whether kernels use programmatic dependent launch."""
        return self.target.startswith("sm_") and int(self.target[3:]) >= 90

    def peak(self, itemsize: int) -> float:
        """Operations per second of the products, by element size."""
        return self.matrix if itemsize == 2 else self.vector


SHEET = "vendor's data sheet"
PAPER = "vendor's architecture paper"

DEVICES = {
    device.key: device
    for device in (
        Device("h100", "NVIDIA H100 SXM 80GB", "sm_90", 132, 3.35e12, 1.83e9, 989.4e12, 66.9e12, 50e6, 7e12, 600e-9,
               80e9, SHEET),
        Device("h100-pcie", "NVIDIA H100 PCIe 80GB", "sm_90", 114, 2.0e12, 1.62e9, 756e12, 51.2e12, 50e6, 6e12, 600e-9,
               80e9, SHEET),
        Device("h200", "NVIDIA H200 SXM", "sm_90", 132, 4.8e12, 1.83e9, 989.4e12, 66.9e12, 50e6, 7e12, 600e-9,
               141e9, SHEET),
        Device("a100", "NVIDIA A100 SXM 80GB", "sm_80", 108, 2.039e12, 1.41e9, 312e12, 19.5e12, 40e6, 7.2e12, 600e-9,
               80e9, f"{SHEET}; cache bandwidth (5120 bytes per clock): {PAPER}"),
        Device("a100-40", "NVIDIA A100 SXM 40GB", "sm_80", 108, 1.555e12, 1.41e9, 312e12, 19.5e12, 40e6, 7.2e12, 600e-9,
               40e9, f"{SHEET}; cache bandwidth (5120 bytes per clock): {PAPER}"),
        Device("4090", "NVIDIA GeForce RTX 4090", "sm_89", 128, 1.008e12, 2.52e9, 165.2e12, 82.6e12, 72e6, 5e12, 550e-9,
               24e9, PAPER),
        Device("3090", "NVIDIA GeForce RTX 3090", "sm_86", 82, 0.936e12, 1.695e9, 71.2e12, 35.6e12, 6e6, 2.5e12, 550e-9,
               24e9, PAPER),
        Device("l4", "NVIDIA L4", "sm_89", 58, 0.3e12, 2.04e9, 121e12, 30.3e12, 48e6, 2e12, 550e-9, 24e9, SHEET),
        Device("l40s", "NVIDIA L40S", "sm_89", 142, 0.864e12, 2.52e9, 362e12, 91.6e12, 96e6, 5.5e12, 550e-9,
               48e9, SHEET),
        Device("b200", "NVIDIA B200", "sm_100", 148, 8.0e12, 1.85e9, 2250e12, 75e12, 126e6, 12e12, 650e-9,
               180e9, SHEET),
        Device("5090", "NVIDIA GeForce RTX 5090", "sm_120", 170, 1.792e12, 2.407e9, 209.5e12, 104.8e12, 96e6, 7e12,
               600e-9, 32e9, PAPER),
        Device("mi300x", "AMD Instinct MI300X", "gfx942", 304, 5.3e12, 2.1e9, 1307.4e12, 163.4e12, 256e6, 17.2e12,
               800e-9, 192e9, f"{SHEET}, cache bandwidth (Infinity Cache) too"),
        Device("7900xtx", "AMD Radeon RX 7900 XTX", "gfx1100", 48, 0.96e12, 2.5e9, 122.8e12, 61.4e12, 96e6, 3.5e12,
               700e-9, 24e9, SHEET),
    )
}  # fmt: skip
ALIASES = {
    "h100-sxm": "h100", "a100-80": "a100", "rtx4090": "4090", "rtx3090": "3090", "rtx5090": "5090",
    "rx7900xtx": "7900xtx",
}  # fmt: skip

# Of a user's file: name in the file, field of `Device`, factor to its unit.
NUMBERS = {
    "units": ("units", 1.0),
    "bandwidth_gbs": ("bandwidth", 1e9),
    "clock_ghz": ("clock", 1e9),
    "tflops_16bit": ("matrix", 1e12),
    "tflops_fp32": ("vector", 1e12),
    "cache_mb": ("cache", 1e6),
    "memory_gb": ("memory", 1e9),
    "cache_gbs": ("cache_bandwidth", 1e9),
    "latency_ns": ("latency", 1e-9),
}
OPTIONAL = {"cache_gbs", "latency_ns"}
USUAL_LATENCY, USUAL_CACHE = 650e-9, 2.5  # of a device whose file does not say: seconds, times its memory's bandwidth
EXAMPLE = (
    '{"like": "h100", "bandwidth_gbs": 4000} or {"name": "mine", "target": "sm_90", "units": 132, '
    '"bandwidth_gbs": 3350, "clock_ghz": 1.8, "tflops_16bit": 989, "tflops_fp32": 67, "cache_mb": 50, "memory_gb": 80}'
)


def find(name: str) -> Device:
    """The device of that name, or the one that a JSON file describes. Raises InputError for anything else."""
    key = name.lower().replace("_", "-").replace(" ", "")
    if ALIASES.get(key, key) in DEVICES:
        return DEVICES[ALIASES.get(key, key)]
    if name.lower().endswith(".json") or os.path.isfile(name):
        return read(Path(name))
    close = difflib.get_close_matches(key, [*DEVICES, *ALIASES], 1, 0.5)
    hint = f"Did you mean {ALIASES.get(close[0], close[0])}? " if close else ""
    raise InputError(
        f"--gpu: no device is called {name!r}. {hint}There are {', '.join(DEVICES)}, or a JSON file such as {EXAMPLE}"
    )


def named_like(name: str) -> Device | None:
    """The known device that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"; None if it is not known."""
    words = name.lower().replace("-", " ").split()
    fitting = {
        "h100-pcie": {"h100", "pcie"}, "a100-40": {"a100", "40gb"}, "h100": {"h100"}, "h200": {"h200"},
        "a100": {"a100"}, "4090": {"4090"}, "3090": {"3090"}, "l4": {"l4"}, "l40s": {"l40s"}, "b200": {"b200"},
        "5090": {"5090"}, "mi300x": {"mi300x"}, "7900xtx": {"7900", "xtx"},
    }  # fmt: skip
    variants = {"laptop", "max", "d", "mobile", "ti", "nvl"}  # 4090 Laptop, 4090 D, 3090 Ti, H100 NVL: other chips
    for key, needed in fitting.items():
        flat = {word for part in words for word in (part, part.split("sxm")[0])}
        if needed <= flat and not variants & flat and ("pcie" in needed) == ("pcie" in flat):
            return DEVICES[key]
    return None


def read(path: Path) -> Device:
    """A device from a JSON object with the fields of `NUMBERS`, `name` and `target`, or some of them and `like`.

    Raises InputError naming the field that is missing, unknown or cannot be.
    """
    try:
        data = read_json(path, InputError)
    except InputError as error:
        raise InputError(f"--gpu: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"--gpu: {path} holds {type(data).__name__}, not an object such as {EXAMPLE}")
    allowed = {*NUMBERS, "name", "target", "like"}
    for field in data:
        if field not in allowed:
            close = difflib.get_close_matches(field, allowed, 1)
            hint = f"did you mean {close[0]}?" if close else f"fields are {', '.join(sorted(allowed))}"
            raise InputError(f"--gpu: {path}: unknown field {shown(field)}; {hint}")
    base = _base(path, data)
    given: dict[str, Any] = {}
    for name, (field, factor) in NUMBERS.items():
        if name in data:
            given[field] = _number(path, name, data[name]) * factor
    if "units" in given:
        if given["units"] != int(given["units"]):
            raise InputError(f"--gpu: {path}: units must be a whole number, not {data['units']!r}")
        given["units"] = int(given["units"])
    given |= {key: _text(path, key, data[key]) for key in ("name", "target") if key in data}
    device = replace(base, **{"name": path.stem} | given, key="custom", source=f"{path.name}, not checked")
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", device.target):
        raise InputError(f"--gpu: {path}: target must look like sm_90 or gfx942, not {device.target!r}")
    if device.cache_bandwidth < device.bandwidth:
        raise InputError(
            f"--gpu: {path}: cache_gbs ({device.cache_bandwidth / 1e9:g}) is below bandwidth_gbs "
            f"({device.bandwidth / 1e9:g}); everything passes the cache, so it cannot be the slower one"
        )
    return device


def _base(path: Path, data: dict[str, Any]) -> Device:
    """The values that the file's numbers replace: those of the device it is like, or the optional ones alone."""
    if "like" in data:
        like = _text(path, "like", data["like"])
        if like.lower().endswith(".json") or os.path.isfile(like):
            raise InputError(f"--gpu: {path}: like must name one of {', '.join(DEVICES)}, not a file")
        return find(like)
    missing = [name for name in [*NUMBERS, "target"] if name not in data and name not in OPTIONAL]
    if missing:
        raise InputError(
            f"--gpu: {path} lacks {', '.join(missing)}; give them, or add a field like with one of {', '.join(DEVICES)}"
        )
    bandwidth = _number(path, "bandwidth_gbs", data["bandwidth_gbs"]) * 1e9
    blank: dict[str, Any] = {item.name: "" if item.type in (str, "str") else 0 for item in fields(Device)}
    return Device(**blank | {"latency": USUAL_LATENCY, "cache_bandwidth": USUAL_CACHE * bandwidth})


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9 or not math.isfinite(value):
        raise InputError(f"--gpu: {path}: {name} must be a positive number below 1e9, not {shown(value)}")
    return float(value)


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(f"--gpu: {path}: {name} must be a text, not {shown(value)}")
    return value
