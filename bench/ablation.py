"""Find where the time of a decode step goes: leave one op out at a time, and time the step without it.

    python -m bench.ablation [--rows 2] [--context 860] [--text 200] [--whole] [--table FILE ...] [--json FILE]
    python -m bench.ablation --whole --rows 1 2 16 64 --weights float int8

The whole model with random weights, as a CUDA graph, as the engine runs it. What an op costs within the step is not
what it takes alone: its launch hides behind the op before it, or does not. Needs a GPU.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.captured import CapturedStep, Load, random_model, state_for, without
from bench.device import Device, open_device
from bench.measure import DTYPES, bytes_per_step, read_bandwidth
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, WEIGHTS
from dia_kernels import get_ops, launcher

OPS = (
    "embed_codes", "rms_norm_linear", "rope_attention", "linear_residual", "cross_attention", "rms_norm_glu",
    "codebook_logits", "sample",
)  # fmt: skip


def _seconds(device: Device, model: DiaModel, state: DecodeState, load: Load) -> float:
    return CapturedStep(device, model, state, load).seconds()


def _under(tables: Iterable[Path], seconds: Callable[[], float]) -> Iterator[tuple[str, float]]:
    """Yield the time of a step under each table, and after it that of the default configs again: drift shows."""
    before = os.environ.get("DIA_KERNELS_TABLE")
    for table in tables:
        try:
            os.environ["DIA_KERNELS_TABLE"] = str(table.absolute())
            yield table.stem, seconds()
        finally:
            os.environ.pop("DIA_KERNELS_TABLE")
            os.environ.update({"DIA_KERNELS_TABLE": before} if before else {})
        yield "default again", seconds()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="of the step: 1, or twice the requests")
    parser.add_argument("--context", type=int, default=860)
    parser.add_argument("--text", type=int, default=200, help="bytes")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--weights", choices=WEIGHTS, nargs="+", default=[FLOAT], help="one model after another (%(default)s)"
    )
    parser.add_argument("--layers", type=int, help="of the decoder (default: all)")
    parser.add_argument("--whole", action="store_true", help="time the whole step only")
    parser.add_argument("--table", type=Path, nargs="+", default=[], help="configs to time beside the default ones")
    parser.add_argument("--device", default="cuda")
    add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        device = open_device(options.device)
        ops = get_ops("triton", device.torch)
        for table in options.table:
            launcher.read_table(str(table))
        results = Results(parser, options, arguments, device.torch)
    except (DiaFastError, ValueError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    reads = read_bandwidth(device.torch, 2 << 30)
    for weights in options.weights:
        model = random_model(DTYPES[options.dtype], device.torch, ops, options.layers, weights)
        _of_model(device, model, weights, reads, options, results)
    return results.end(0)


def _of_model(
    device: Device, model: DiaModel, kind: str, reads: float, options: argparse.Namespace, results: Results
) -> None:
    """Time steps of a model. kind: of `quantization.WEIGHTS`; reads: bytes per second."""
    weights, ops = bytes_per_step(model), model.ops
    print(f"{device.name}, reads {reads / 1e12:.2f} TB/s; a step reads {weights / 1e9:.3f} GB of weights ({kind})")
    results.add({"weights": kind, "op": "reading memory"}, {"bytes_per_second": reads, "weight_bytes": weights})
    with torch.inference_mode():
        for rows in options.rows:
            load = Load(rows, options.context, options.text)
            state = state_for(model, load)
            whole = _seconds(device, model, state, load)
            share = weights / reads / whole
            print(f"{rows} rows: {whole * 1e3:.4f} ms a step, {share:.1%} of what reading the weights alone allows")
            results.add({"weights": kind, "rows": rows, "op": "all"}, {"seconds": whole, "share": share})
            for table, seconds in _under(options.table, partial(_seconds, device, model, state, load)):
                print(f"  {table:24} {seconds * 1e3:.4f} ms, {whole / seconds:.3f} times as fast", flush=True)
                results.add({"weights": kind, "rows": rows, "op": "all", "table": table}, {"seconds": seconds})
            for op in () if options.whole else OPS:
                model.ops = without(ops, op)
                saved = whole - _seconds(device, model, state, load)
                model.ops = ops
                print(f"  {op:16} {saved * 1e6:8.1f} us  {saved / whole:6.1%}", flush=True)
                results.add({"weights": kind, "rows": rows, "op": op}, {"seconds": saved, "share": saved / whole})
            del state


if __name__ == "__main__":
    sys.exit(main())
