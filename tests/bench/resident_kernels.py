"""Kernels whose programs wait for one another, and whose loads go through shared memory, run by their PTX.

python -m tests.bench.resident_kernels      # prints what was found, as JSON; needs a Triton compiler
"""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from bench import ptx
from bench.tools.resident import Launch
from dia_kernels import aot, launcher

TARGET = r"(setp\.(?:ge|lt)\.s32\s+%p\d+, %r\d+), %r\d+"  # of those that arrive, the comparison with all
ARRIVAL = r"(\.add\.u32 %r\d+, \[ %rd\d+ \+ 0 \]), %r\d+"
PROGRAMS, N, K, BLOCK = 3, 128, 256, 32


@triton.jit
def _two_phases(x_ptr, y_ptr, z_ptr, counter_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write y = 2 x, wait at a barrier of the whole grid, read what another program has written: z = y + 1."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    n = tl.arange(0, N)
    tl.store(y_ptr + program * N + n, tl.load(x_ptr + program * N + n) * 2)
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while arrived < programs:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
    tl.debug_barrier()
    tl.store(z_ptr + program * N + n, tl.load(y_ptr + (programs - 1 - program) * N + n) + 1)


@triton.jit
def _pipelined(x_ptr, w_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply x by w transposed, 16 x 16, with both through shared memory."""
    rows, k, columns = tl.arange(0, 16)[:, None], tl.arange(0, BLOCK)[None, :], tl.arange(0, 16)[None, :]
    acc = tl.zeros([16, 16], tl.float32)
    for step in tl.range(0, K // BLOCK, num_stages=3):
        x = tl.load(x_ptr + rows * K + step * BLOCK + k)
        w = tl.load(w_ptr + rows * K + step * BLOCK + k)
        acc = tl.dot(x, tl.trans(w), acc)
    tl.store(out_ptr + rows * 16 + columns, acc)


def compiled(kernel: Any, programs: int, shapes: dict[str, tuple[int, ...]], **constants: int) -> Any:
    """Return a launch, compiled for sm_90; names of integers and of results in float32 say what they are."""
    dtypes = {"counter": torch.int32, "out": torch.float32}
    tensors = [torch.empty(s, dtype=dtypes.get(n, torch.bfloat16), device="meta") for n, s in shapes.items()]
    with aot.compiling("sm_90") as found:
        launcher.run(kernel, (programs,), *tensors, **constants, num_warps=2)
    return found[0]


def run(launch: Any, text: str, programs: int, tensors: dict[str, torch.Tensor], seed: int) -> tuple[int, list[str]]:
    """Run the text of a launch on tensors; return the instructions and the races."""
    memory = {n: t.view(-1).view(torch.int16).numpy().view(np.uint16) for n, t in enumerate(tensors.values(), 1)}
    resident = Launch(
        text, (programs, 1, 1), 2, launch.result.metadata.shared + 2, [n * ptx.BUFFER for n in memory] + [0, 0], memory,
        dict(enumerate(tensors, 1)), [], seed, budget=100_000,
    )  # fmt: skip
    return resident.run(), sorted(resident.races)


def two_phases(edit: Callable[[str], str] = str, seed: int = 0) -> list[str]:
    """Return what is wrong with a run of the first kernel."""
    shapes = {"x": (PROGRAMS, N), "y": (PROGRAMS, N), "z": (PROGRAMS, N), "counter": (1,)}
    launch = compiled(_two_phases, PROGRAMS, shapes, N=N)
    given = {name: torch.full(shapes[name], torch.nan, dtype=torch.bfloat16) for name in ("x", "y", "z")}
    given["x"] = torch.arange(PROGRAMS * N).view(PROGRAMS, N).remainder(100).bfloat16()
    given["counter"] = torch.zeros(1, dtype=torch.int32)
    try:
        _, races = run(launch, edit(launch.asm["ptx"]), PROGRAMS, given, seed)
    except RuntimeError as error:
        return [str(error)]
    right = torch.equal(given["z"], given["x"].flip(0) * 2 + 1)
    return races + ([] if right else ["z is wrong"])


def pipelined(edit: Callable[[str], str] = str, seed: int = 0) -> list[str]:
    """Return what is wrong with a run of the second kernel."""
    launch = compiled(_pipelined, 1, {"x": (16, K), "w": (16, K), "out": (16, 16)}, K=K, BLOCK=BLOCK)
    torch.manual_seed(seed)
    given = {name: torch.randint(-8, 9, (16, K)).bfloat16() for name in "xw"}  # sums of integers are exact
    given["out"] = torch.full((16, 16), torch.nan)
    _, races = run(launch, edit(launch.asm["ptx"]), 1, given, seed)
    exact = torch.equal(given["out"], given["x"].float() @ given["w"].float().T)
    return races + ([] if exact else ["out is wrong"])


def main() -> None:
    """Print the faults of both kernels as they are, and with planted ones."""
    seeds = range(3)
    found = {
        "two phases": [problem for seed in seeds for problem in two_phases(seed=seed)],
        "pipelined": [problem for seed in seeds for problem in pipelined(seed=seed)],
        "nothing released": two_phases(lambda text: text.replace("gpu.release", "gpu.relaxed")),
        "nothing acquired": two_phases(lambda text: text.replace("ld.global.gpu.acquire", "ld.global")),
        "everybody let through": two_phases(lambda text: re.sub(TARGET, r"\1, 0", text)),
        "nobody arrives": two_phases(lambda text: re.sub(ARRIVAL, r"\1, 0", text)),
        "copies not awaited": pipelined(lambda text: re.sub(r"(cp\.async\.wait_group\s+)\d", r"\g<1>9", text)),
        "no barriers": pipelined(lambda text: re.sub(r"bar\.sync[^;]*;", "", text)),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
