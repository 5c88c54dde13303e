"""`dia-fast plan`: how fast a decode step could be on a GPU that need not be here."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dia_fast.cli.info import describe
from dia_fast.cli.paths import path
from dia_fast.errors import InputError

DESCRIPTION = """\
Predicts the time of a decode step on a GPU, kernel by kernel: from the bytes that each kernel moves (counted), the
machine code that Triton makes of it (registers, bytes in flight, instructions), and the published figures of the GPU.
What no data sheet says is assumed, and listed; every time is a range from a best to a worst case.

Nothing is run and no weights are read. With --measure, on a machine with a GPU, the same launches are timed as well;
if that GPU is none of those below and --gpu names no other, the measurement is printed without a prediction.
"""

EXAMPLES = """\
GPUs: h100, h100-pcie, h200, a100, a100-40, 4090, 3090, l4, l40s, b200, 5090, mi300x, 7900xtx, or a JSON file:
  {"like": "h100", "bandwidth_gbs": 4000, "memory_gb": 96}

examples:
  dia-fast plan --gpu h100
  eight dialogues at once, each 20 seconds in
    dia-fast plan --gpu 4090 --batch 8 --context 1720
  what would weights in 8 bits change?
    dia-fast plan --gpu 4090 --weights int8
  half precision, pictures, and everything as data
    dia-fast plan --gpu a100 --dtype fp16 --plots pictures --json > plan.json
  on a machine with a GPU: is the prediction right?
    dia-fast plan --measure

A step makes 1/86 s of sound for every dialogue in it. Under guidance a dialogue takes two rows of a step: --batch
counts dialogues, --rows counts rows.
"""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_ROWS = 64  # of one launch


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="predict the speed on a GPU from counted bytes and compiled code",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpu", type=path, metavar="NAME", help="see below, or a JSON file (with --measure: the one that is here)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch", type=int, metavar="N", help="dialogues at once, 1 to 32 (1)")
    size.add_argument("--rows", type=int, metavar="N", help="rows of a step instead: two per dialogue under guidance")
    parser.add_argument(
        "--context", type=int, default=860, metavar="N", help="steps so far of each (%(default)s: 10 s)"
    )
    parser.add_argument("--text", type=int, default=200, metavar="N", help="bytes of text of each (%(default)s)")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, *DTYPES.values()], default="bf16", metavar="TYPE", help="bf16, fp16 or fp32 (bf16)"
    )
    parser.add_argument("--weights", help="int8 or int8-mlp: matrices in 8 bits (default: float, all as --dtype)")
    parser.add_argument("--no-guidance", action="store_true", help="one row per dialogue instead of two")
    parser.add_argument("--no-graph", action="store_true", help="launch by launch instead of a CUDA graph")
    parser.add_argument(
        "--model", type=path, help="take the sizes from this checkpoint: Hub repository or local folder (Dia-1.6B)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--offline", action="store_true", help="use only what has been downloaded before")
    parser.add_argument("--measure", action="store_true", help="time the same on the GPU of this machine")
    parser.add_argument("--device", help="the GPU to measure on: cuda, cuda:1, ... (cuda)")
    parser.add_argument("--plots", type=path, metavar="FOLDER", help="save pictures there, as PNG and SVG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.gpu is None and not args.measure:
        from dia_fast.diagnostics.roofline.devices import DEVICES

        raise InputError(f"--gpu is missing: name one of {', '.join(DEVICES)}, or a JSON file that describes another")
    if args.device is not None and not args.measure:
        raise InputError("--device names the GPU to measure on: it goes with --measure")
    if args.plots is not None:
        from dia_fast.diagnostics.plotting import require_matplotlib

        require_matplotlib()
    from dia_fast.diagnostics.roofline import devices

    named = devices.find(args.gpu) if args.gpu is not None else None
    timer = _timer(args)
    workload, checkpoint = _workload(args)
    here = devices.named_like(timer.name) if timer is not None else None
    measured = _measure(workload, timer, checkpoint) if timer is not None else None
    if measured is not None and named is None and here is None:
        return _show_measured(args, workload, measured)
    notes = []
    if timer is not None and named is not None and named != here:
        notes.append(f"predicted for {named.name}, measured on {timer.name}")
    return _show_predicted(args, workload, named or here, measured, notes)


def _show_predicted(args: argparse.Namespace, workload: Any, device: Any, measured: Any, notes: list[str]) -> int:
    from dia_fast.diagnostics.roofline import report
    from dia_fast.diagnostics.roofline.predict import predict
    from dia_fast.diagnostics.roofline.published import compare

    made = predict(device, workload)
    made.notes.extend([*_fit(made), *notes])
    other = predict(device, _flipped(workload))
    compared = compare(min(workload.context, 3072), min(workload.text, 1024))
    paths = []
    if args.plots is not None:
        from dia_fast.diagnostics.roofline import plots

        paths = plots.save(made, Path(args.plots), measured)
    if args.json:
        found = report.data(made, other, compared, measured)
        print(json.dumps(found | ({"plots": [str(picture) for picture in paths]} if paths else {}), indent=1))
    else:
        print(report.text(made, other, compared, measured))
        if paths:
            print(f"\n{len(paths)} pictures in {args.plots}")
    return 0


def _show_measured(args: argparse.Namespace, workload: Any, measured: dict[str, Any]) -> int:
    """Show the measurement of a GPU that has no published figures here."""
    from dia_fast.diagnostics.roofline import devices, report

    why = (
        f"no prediction stands beside it: {measured['device']} has no published figures here; name a similar GPU with "
        f"--gpu ({', '.join(devices.DEVICES)}), or describe it in a JSON file"
    )
    notes = [why]
    if args.plots is not None:
        notes.append("no pictures were drawn: they are of predictions")
    if args.json:
        print(json.dumps(report.measured_data(workload, measured, notes), indent=1))
    else:
        print(report.measured_text(workload, measured, notes))
    return 0


def _workload(args: argparse.Namespace) -> tuple[Any, Any]:
    """`predict.Workload`, every number checked, and the checkpoint if its weights are wanted. Raises DiaFastError."""
    from dia_fast.diagnostics.roofline.predict import Workload
    from dia_fast.engine import MAX_BATCH
    from dia_fast.model.quantization import FLOAT, check_weights

    guided = not args.no_guidance
    requests = 1 if args.batch is None else args.batch
    if args.rows is not None:
        if not 1 <= args.rows <= MAX_ROWS:
            raise InputError(f"--rows must be from 1 to {MAX_ROWS}, the most that one launch takes, not {args.rows}")
        if guided and args.rows % 2:
            raise InputError(
                f"--rows {args.rows}: under guidance every dialogue has two rows, it must be even; or add --no-guidance"
            )
        requests = args.rows // 2 if guided else args.rows
    if not 1 <= requests <= MAX_BATCH:
        name, given = ("--rows", args.rows) if args.rows is not None else ("--batch", args.batch)
        raise InputError(f"{name} {given}: a step serves 1 to {MAX_BATCH} dialogues at once")
    check_weights(args.weights)
    config, checkpoint = _model(args)
    for option, value, most in (
        ("--context", args.context, config.decoder.max_position_embeddings),
        ("--text", args.text, config.encoder.max_position_embeddings),
    ):
        if not 1 <= value <= most:
            raise InputError(f"{option} must be from 1 to {most} for this model, not {value}")
    dtype = DTYPES.get(args.dtype, args.dtype)
    weights = args.weights or (FLOAT if checkpoint is None else checkpoint.weights)
    workload = Workload(config, dtype, requests, args.context, args.text, guided, not args.no_graph, weights)
    return workload, checkpoint


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The configuration, and with --measure the checkpoint that was asked for. Raises DiaFastError."""
    from dia_fast.checkpoint.loading import open_checkpoint
    from dia_fast.model.config import DiaConfig

    if args.model is None:
        return DiaConfig(), None
    if not args.measure:
        return describe(args)["config"], None
    checkpoint = open_checkpoint(args.model, revision=args.revision, local_files_only=args.offline)
    return checkpoint.config, checkpoint


def _flipped(workload: Any) -> Any:
    from dataclasses import replace

    return replace(workload, graph=not workload.graph)


def _fit(made: Any) -> list[str]:
    """A sentence on the weights and what the requests need, beside the device's memory."""
    from dia_fast.cli.info import memory_needed, readable
    from dia_fast.diagnostics.roofline.predict import SIZES

    workload = made.workload
    parts = memory_needed(
        workload.config, SIZES[workload.dtype], batch=workload.requests, length=workload.context,
        text_length=workload.text, guided=workload.guided, weights=workload.weights,
    )  # fmt: skip
    needed, has = readable(parts["total"]), readable(made.device.memory)
    if parts["total"] > made.device.memory:
        return [f"it does not fit: {needed} are needed, the device has {has}"]
    return [f"memory: {needed}, {readable(parts['weights'])} of it weights; the device has {has}"]


def _timer(args: argparse.Namespace) -> Any:
    """Make the timer of the GPU, or None without --measure. Raises InputError where there is no GPU."""
    if not args.measure:
        return None
    from dia_fast.diagnostics.roofline import measure

    return measure.gpu_timer(args.device)


def _measure(workload: Any, timer: Any, checkpoint: Any) -> dict[str, Any]:
    from dia_fast.diagnostics.roofline import measure

    print(f"measuring on {timer.name}, a minute or so ...", file=sys.stderr, flush=True)
    return measure.measure(workload, timer, checkpoint)
