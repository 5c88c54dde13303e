"""Measure how many launches ahead programs become resident under programmatic dependent launch. Needs sm_90 or later.

    python -m bench.residency [--device cuda] [--json FILE]

Launch 0 of a chain spins for 30 us; ten others follow, each of which lets the next one start at once and then waits for
the one in front. The time at which a launch's programs start, before or behind the end of launch 0, says how far ahead
the hardware takes them: the weights of as many launches can be on their way at a time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from bench.captured import QuickCapture
from bench.device import open_device
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError
from dia_kernels import launcher

CHAIN = 10  # launches behind the first one
SHAPES = ((132, 4), (264, 4), (528, 4), (132, 8))  # programs and warps of a launch
FIRST_NS, OTHER_NS = 30_000, 500


@triton.jit
def _clock():  # type: ignore[no-untyped-def]
    """Return the GPU's time in nanoseconds."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _probe(  # type: ignore[no-untyped-def]
    out_ptr,  # [launches, programs, 3] int64: start, end of the wait, end
    index,
    spin_ns,
):
    start = _clock()
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    waited = _clock()
    now = waited
    while now - waited < spin_ns:
        now = _clock()
    at = out_ptr + (index * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(at, start)
    tl.store(at + 1, waited)
    tl.store(at + 2, now)


def chain(out: torch.Tensor, programs: int, warps: int) -> None:
    """Launch the chain. out: `[1 + CHAIN, programs, 3]` int64."""
    for index in range(1 + CHAIN):
        spin = OTHER_NS if index else FIRST_NS
        launcher.run(_probe, (programs,), out, index, spin, num_warps=warps, launch_pdl=True)


def starts(out: torch.Tensor) -> list[tuple[float, float]]:
    """Return the first and the last start of each launch behind the first, in us after the end of launch 0."""
    end = out[0, :, 2].max()
    return [((t[:, 0].min() - end).item() / 1e3, (t[:, 0].max() - end).item() / 1e3) for t in out[1:]]


def measure(programs: int, warps: int, device: torch.device, capture: Callable[..., Any]) -> dict[str, Any]:
    """Return the starts of every launch of a chain, and the number of launches that were resident ahead."""
    out = torch.zeros(1 + CHAIN, programs, 3, dtype=torch.int64, device=device)
    replay = capture(lambda: chain(out, programs, warps))
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    found = starts(out.cpu())
    ahead = next((n for n, (_, last) in enumerate(found) if last >= 0), len(found))
    return {"programs": programs, "warps": warps, "ahead": ahead, "starts_us": found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="residency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        device = open_device(options.device)
    except DiaFastError as error:
        print(f"residency: {error}", file=sys.stderr)
        return 2
    if device.torch.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device.torch) < (9, 0):
        print(f"residency: {device.name} has no programmatic dependent launch, which came with sm_90", file=sys.stderr)
        return 2
    try:
        results = Results(parser, options, arguments, device.torch)
    except DiaFastError as error:
        print(f"residency: {error}", file=sys.stderr)
        return 2
    capture = QuickCapture()
    for programs, warps in SHAPES:
        result = measure(programs, warps, device.torch, capture)
        case = {"programs": programs, "warps": warps}
        results.add(case, {"ahead": result["ahead"]})
        results.extend(
            (case | {"launch": number}, {"first_start_us": first, "last_start_us": last})
            for number, (first, last) in enumerate(result["starts_us"], 1)
        )
        times = ", ".join(f"{first:.1f} to {last:.1f}" for first, last in result["starts_us"])
        print(
            f"{programs} programs of {warps} warps: {result['ahead']} launches ahead; starts in us: {times}", flush=True
        )
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
