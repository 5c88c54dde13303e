"""Run a projection's PTX, to show that the bits of a row do not depend on the other rows. No GPU is needed.

    python -m bench.row_bits --targets sm_90 --dtypes float32        # all row counts; no GPU is needed

`bench.ptx` runs the programs of the first and the last features of each projection of a step on made-up numbers, twice.
Ordinary ones show that the code is right: no further from the exact result than twice the error of plain torch in the
same dtype plus
one rounding. Then every product has an opposite one in a far column, so that nothing but the sum's roundings remains:
any other order of additions shows, however coarse the output's dtype. In both runs, what several row counts have in
common, a feature of a row, must be equal to the bit. The exit code is 1 if it is not.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import ptx
from bench.codegen import DTYPES, PROJECTIONS, ROWS
from bench.tools.results import Results, add_options
from dia_fast.diagnostics import launches
from dia_fast.errors import DiaFastError
from dia_fast.model.quantization import FLOAT, WEIGHTS
from dia_kernels import aot as ahead
from dia_kernels import launcher as launch

TARGETS = tuple(target for target in ahead.TARGETS if target.startswith("sm_"))
EPS = 1e-5


def made_up(name: str, index: Tensor, tensor: Tensor, cancelling: bool = False) -> Tensor:
    """Elements `index` of the argument called `name`, in its dtype: near 1 for norms, small for weights.

    cancelling: products of a row and a feature cancel column by mirrored column, and there is nothing to add to.
    """
    sign = torch.ones(())
    if cancelling and name in ("x_ptr", "norm_ptr", "weight_ptr"):
        width = tensor.shape[-1]
        column = index % width
        index = index - column + torch.minimum(column, width - 1 - column)
        sign = torch.where((name == "weight_ptr") & (column >= width // 2), -(2.0**14), 2.0**14)
    with np.errstate(over="ignore"):  # the mixer of SplitMix64
        z = (index.numpy().astype(np.uint64) + np.uint64(sum(name.encode()) << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1)  # [-1, 1)
    if tensor.dtype == torch.int8:
        uniform = torch.round(uniform * 127) * sign.sign()
    elif name == "scale_ptr":
        uniform = torch.exp2(torch.round(3 * uniform)) / 127
        if not cancelling:
            uniform *= (3 / 2048) ** 0.5
    elif name == "norm_ptr":
        uniform = 1 + uniform / 2
    elif name == "weight_ptr":
        uniform *= sign if cancelling else (3 / tensor.shape[1]) ** 0.5
    elif name == "residual_ptr" and cancelling:
        uniform *= 0
    return uniform.to(tensor.dtype)


def _reader(name: str, tensor: Tensor, cancelling: bool) -> ptx.Read:
    size = tensor.element_size()

    def read(offsets: ptx.Bits) -> ptx.Bits:
        if offsets.min() < 0 or offsets.max() >= tensor.numel() * size:
            raise IndexError(f"{name}: bytes {offsets.min()} to {offsets.max()} of {tensor.numel() * size} were read")
        if size == 1:  # two elements in a word
            index = torch.from_numpy(offsets[:, :, None] + np.arange(2))
        else:
            index = torch.from_numpy(offsets[:, :: size // 2] // size)
        values = made_up(name, index, tensor, cancelling)
        return values.view(torch.int16).numpy().view(np.uint16).reshape(offsets.shape)

    return read


@dataclass(frozen=True)
class Result:
    """Output of the first and the last program of a launch.

    bits: by (row, feature), with ordinary and with cancelling numbers; error: the largest of the former against the
    exact result, over what is allowed.
    """

    bits: dict[tuple[int, int], tuple[int, int]]
    error: float


def run(compiled: ahead.Compiled) -> Result:
    """Run a projection compiled for NVIDIA. Raises IndexError for a wild access."""
    ordinary, cancelling = (_written(compiled, cancelling) for cancelling in (False, True))
    return Result({at: (bits, cancelling[at]) for at, bits in ordinary.items()}, _error(compiled, ordinary))


def _output(compiled: ahead.Compiled) -> str:
    return "residual_ptr" if "residual_ptr" in compiled.arguments else "out_ptr"


def _written(compiled: ahead.Compiled, cancelling: bool) -> dict[tuple[int, int], int]:
    """Return the output for the first and the last features: bits by (row, feature)."""
    given = [(name, value) for name, value in compiled.arguments.items() if value is not None]
    parameters = {name: (n + 1) * ptx.BUFFER if isinstance(v, Tensor) else v for n, (name, v) in enumerate(given)}
    readers = {n + 1: _reader(name, v, cancelling) for n, (name, v) in enumerate(given) if isinstance(v, Tensor)}
    words: dict[int, int] = {}
    threads = 32 * compiled.result.metadata.num_warps
    programs, shared = range(compiled.grid[0]), compiled.meta["T"].ROW_BLOCKS  # rows of the same features
    for program in {*programs[:shared], *programs[-shared:]}:
        words |= ptx.Program(program, threads, list(parameters.values()), readers).run(compiled.asm["ptx"]).written
    name = _output(compiled)
    tensor: Tensor = compiled.arguments[name]
    bits: dict[tuple[int, int], int] = {}
    for address, word in words.items():
        index, byte = divmod(address - parameters[name], tensor.element_size())
        if not 0 <= index < tensor.numel():
            raise IndexError(f"{name}: element {index} of {tensor.numel()} was written")
        where = divmod(index, tensor.numel() // len(tensor))
        bits[where] = bits.get(where, 0) | word << 8 * byte
    return bits


def _error(compiled: ahead.Compiled, bits: dict[tuple[int, int], int]) -> float:
    arguments, out = compiled.arguments, compiled.arguments[_output(compiled)]
    x, weight = arguments["x_ptr"], arguments["weight_ptr"]
    rows = sorted({row for row, _ in bits if row < len(x)})
    columns = sorted({feature for _, feature in bits})

    def part(name: str, which: Sequence[int], inner: Sequence[int]) -> Tensor:
        tensor = arguments[name]
        index = torch.tensor(which)[:, None] * (tensor.numel() // len(tensor)) + torch.tensor(inner)
        return made_up(name, index, tensor)

    every = range(x.shape[1])

    def weights(which: Sequence[int], dtype: torch.dtype) -> Tensor:
        values = part("weight_ptr", which, every)
        if values.dtype == torch.int8:
            return (values.double() * part("scale_ptr", which, [0]).double()).to(dtype)
        return values.to(dtype)

    def compute(dtype: torch.dtype) -> Tensor:
        a, w = part("x_ptr", rows, every).to(dtype), weights(columns, dtype)
        if "norm_ptr" in arguments:
            wide = a if dtype == torch.float64 else a.float()
            norm = part("norm_ptr", every, [0])[:, 0].to(wide.dtype)
            a = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm).to(dtype)
        if compiled.kernel == "_rms_norm_glu":
            up = weights([column + len(weight) // 2 for column in columns], dtype)
            return F.silu(a @ w.T) * (a @ up.T)
        if compiled.kernel == "_linear_residual":
            return part("residual_ptr", rows, columns).to(dtype) + a @ w.T
        return a @ w.T

    exact, plain = compute(torch.float64), compute(x.dtype).double()
    raw = torch.tensor([[bits[row, column] for column in columns] for row in rows])
    got = raw.to({2: torch.int16, 4: torch.int32}[out.element_size()]).view(out.dtype).double()
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(x.dtype).eps / 2 * exact.abs().max()
    return float((got - exact).abs().max() / allowed)


def compare(results: Iterable[tuple[str, Result]]) -> list[str]:
    """Return the faults in the results of one projection for several row counts, a sentence each."""
    found = []
    first: dict[tuple[int, int], tuple[str, tuple[int, int]]] = {}
    for label, result in results:
        if not result.error <= 1:
            found.append(f"{label}: error {result.error:.2f} x what is allowed")
        different = [at for at, bits in result.bits.items() if first.setdefault(at, (label, bits))[1] != bits]
        if different:
            row, feature = different[0]
            others = ", ".join(sorted({first[at][0] for at in different}))
            found.append(
                f"{label}: {len(different)} of {len(result.bits)} values differ from {others}, first row {row}, "
                f"feature {feature}"
            )
    return found


def step(
    target: str, dtype: torch.dtype, rows: int, weights: str = FLOAT
) -> dict[tuple[str, int, int], ahead.Compiled]:
    """Compile the projections of a step, by kernel, features and width; of several alike the one with most rows."""
    found: dict[tuple[str, int, int], ahead.Compiled] = {}

    def projections_only(
        launcher: launch.Launcher, kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]
    ) -> None:
        if kernel.fn.__name__ in PROJECTIONS:
            launcher(kernel, grid, *args, **meta)

    with ahead.compiling(target) as compiled, launch.listening(projections_only):
        launches.decode(rows, dtype, model=launches.one_layer(dtype, weights=weights))
    for item in compiled:
        key = (item.kernel, *item.arguments["weight_ptr"].shape)
        if key not in found or len(found[key].arguments["x_ptr"]) < len(item.arguments["x_ptr"]):
            found[key] = item
    return found


def examine(target: str, dtype: str, rows: Sequence[int], found_out: Results, weights: str = FLOAT) -> list[str]:
    """Run all projections of steps of these row counts; print and note what agrees, return what is wrong."""
    results: dict[tuple[str, int, int], list[tuple[str, Result]]] = {}
    for count in rows:
        for key, compiled in step(target, DTYPES[dtype], count, weights).items():
            label = f"{key[0][1:]} [{key[1]}, {key[2]}] on {target}, {dtype}, {len(compiled.arguments['x_ptr'])} rows"
            results.setdefault(key, []).append((label, run(compiled)))
    wrong = []
    for (kernel, features, width), group in results.items():
        found = compare(group)
        wrong += found
        shared = sum(len(result.bits) for _, result in group) - len({at for _, result in group for at in result.bits})
        error = max(result.error for _, result in group)
        print(
            f"{target} {dtype} {kernel[1:]} [{features}, {width}]: {shared} values in common, {len(found)} wrong, "
            f"error at most {error:.2f} of what is allowed",
            flush=True,
        )
        found_out.add(
            {
                "target": target,
                "dtype": dtype,
                "weights": weights,
                "kernel": kernel[1:],
                "features": features,
                "hidden": width,
            },
            {"values_in_common": shared, "wrong": len(found), "error_of_allowed": error},
        )
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.row_bits", description=(__doc__ or "").splitlines()[0])
    for flag, values in (("--targets", TARGETS), ("--dtypes", tuple(DTYPES))):
        parser.add_argument(flag, nargs="+", default=values, choices=values, help="default: all of %(choices)s")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument("--weights", choices=WEIGHTS, default=FLOAT, help="of the projections (%(default)s)")
    add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        results = Results(parser, arguments, argv)
    except DiaFastError as error:
        print(f"row_bits: {error}", file=sys.stderr)
        return 2
    wrong = []
    for target in arguments.targets:
        for dtype in arguments.dtypes:
            wrong += examine(target, dtype, arguments.rows, results, arguments.weights)
    print(*wrong, f"{len(wrong)} violations", sep="\n", file=sys.stderr)
    return results.end(1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
