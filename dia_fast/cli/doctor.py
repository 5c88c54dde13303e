"""`dia-fast doctor`: whether this machine runs the kernels, and whether they compute what they should."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from dia_fast.cli.paths import path
from dia_fast.errors import InputError

DESCRIPTION = """\
Shows versions, the device, which backend will be used and why, and a verdict on every kernel.

On a GPU each kernel runs at the shapes of Dia-1.6B and is compared with its torch reference. On a CPU the kernels are
compiled for the GPUs of --targets and not run; with TRITON_INTERPRET=1 they are interpreted, on small shapes.

With --model the checkpoint and its codec are loaded and checked instead, and speak for a second: on a GPU every call is
compared with the reference, on a CPU every number must be finite. With --weights as well, the weights are rounded to 8
bits and compared with the stored ones in float32: the worst matrix of each layer, and the logits of a second of speech.
"""

EXAMPLES = """\
examples:
  dia-fast doctor
  dia-fast doctor --device cuda:1 --dtype fp16
  dia-fast doctor --device cpu --targets sm_90 gfx942     compile for two GPUs that need not be here
  TRITON_INTERPRET=1 dia-fast doctor --device cpu
  dia-fast doctor --model nari-labs/Dia-1.6B-0626         are these weights whole, and do they speak here?

exit status: 0 nothing wrong was found; 1 a kernel failed or computes something else; 2 wrong options
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check that the kernels work on this machine",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (the GPU if there is one)")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (bf16)", default="bf16")
    parser.add_argument(
        "--targets", nargs="+", default=["sm_90"], metavar="GPU", help="what to compile for on a CPU (%(default)s)"
    )
    parser.add_argument(
        "-m", "--model", type=path, metavar="MODEL", help="check this one: Hub repository, folder, adapter, or demo"
    )
    parser.add_argument(
        "--weights", metavar="WEIGHTS", help="with --model: what rounding to int8 or int8-mlp does to its numbers"
    )
    parser.add_argument("--codec", type=path, default="auto", metavar="CODEC", help="with --model (default: its own)")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--offline", action="store_true", help="use only what has been downloaded before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    from dia_fast.diagnostics import doctor
    from dia_fast.model.device import choose_device, choose_dtype

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    facts = doctor.environment(device)
    if device.type == "cpu":
        facts["cpu product"] = doctor.cpu_product(dtype)
    backend, why = doctor.backend_choice(device)
    if not args.json:
        for key, value in facts.items():
            print(f"{key:13} {value}")
        print(f"{'backend':13} {backend}: {why}", flush=True)
    if args.weights is not None and args.model is None:
        raise InputError("--weights is about a model; name it with --model")
    verdicts, limits = _verdicts(args, device, dtype)
    healthy = all(verdict.healthy for verdict in verdicts)
    if args.json:
        report = {"environment": facts, "backend": backend, "why": why, "kernels": [asdict(v) for v in verdicts]}
        print(json.dumps(report | {"not_checked": limits, "healthy": healthy}, indent=1))
        return 0 if healthy else 1
    for verdict in verdicts:
        print(f"  {verdict.op:22} {verdict.outcome:9} {verdict.detail}")
    for limit in limits:
        print(f"not checked: {limit}")
    wrong = "some kernels do not work here; backend='torch' does"
    print("nothing wrong was found" if healthy else wrong if args.model is None else "the model does not work here")
    return 0 if healthy else 1


def _verdicts(args: argparse.Namespace, device: Any, dtype: Any) -> tuple[list[Any], list[str]]:
    """A verdict for every op or for the model, and what they leave open."""
    import torch

    from dia_fast.diagnostics import doctor
    from dia_kernels.ops import triton_obstacle

    if args.model is not None:
        return _model_verdict(args, device, dtype)
    obstacle = triton_obstacle(device)
    if obstacle is None:
        from dia_fast.model.device import choose_ops

        kernels = choose_ops("triton", device)
        if device.type != "cpu":
            return doctor.check_running(kernels, dtype, device, full_width=True), []
        # Triton's interpreter computes bfloat16 wrongly in every version; float32 shows what it can show.
        found = doctor.check_running(kernels, torch.float32, device, full_width=False)
        return found, ["types other than float32, the shapes of Dia-1.6B, time: kernels are interpreted here"]
    if device.type != "cpu" or not _has_triton():
        return [doctor.Verdict(op, "unchecked", obstacle) for op in doctor.OPS], [f"all kernels: {obstacle}"]
    try:
        for target in args.targets:
            from dia_kernels.aot import gpu_target

            gpu_target(target)
    except ValueError as error:
        raise InputError(f"--targets: {error}") from None
    print(f"compiling for {', '.join(args.targets)}, a minute or so each ...", file=sys.stderr, flush=True)
    left = ["what the kernels compute, and how fast: Triton cannot run them on this device, they were only compiled"]
    return doctor.check_compiling(args.targets, dtype), left


def _model_verdict(args: argparse.Namespace, device: Any, dtype: Any) -> tuple[list[Any], list[str]]:
    from dia_fast.audio.codec import codec_for
    from dia_fast.checkpoint.loading import open_checkpoint
    from dia_fast.diagnostics import doctor

    checkpoint = open_checkpoint(args.model, revision=args.revision, local_files_only=args.offline)
    codec = codec_for(args.model, args.codec)
    if args.weights is not None:
        return _weights_verdicts(args, checkpoint, device)
    left = ["kernels, which a CPU does not run; leave out --model for them"] if device.type == "cpu" else []
    return [doctor.check_model(checkpoint, codec, dtype, device, args.offline)], left


def _weights_verdicts(args: argparse.Namespace, checkpoint: Any, device: Any) -> tuple[list[Any], list[str]]:
    from dia_fast.diagnostics import doctor, precision
    from dia_fast.model.device import choose_ops
    from dia_fast.model.quantization import check_weights

    check_weights(args.weights)
    if args.weights == "float":
        raise InputError("--weights float rounds nothing; use int8 or int8-mlp")
    verdicts = precision.layer_verdicts(checkpoint, args.weights)
    ops = choose_ops("torch", device)
    verdicts.append(precision.logit_errors(checkpoint, args.weights, ops, device, doctor.STEPS).verdict)
    return verdicts, ["how it sounds: listen, or let a recogniser count words"]


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
