"""`dia-fast convert`: a checkpoint from one official layout to the other."""

import argparse
from typing import Any

from dia_fast.cli.paths import path
from dia_fast.errors import InputError

DESCRIPTION = """\
Rewrites a checkpoint in the layout of transformers or of the original package, from whichever it has. Values stay
exactly as they are unless --dtype is narrower. The destination appears complete or not at all.
"""

EXAMPLES = """\
examples:
  for transformers.DiaForConditionalGeneration.from_pretrained
    dia-fast convert dia-v0_1.pth dia-transformers --to transformers
  for the original package, in half the size
    dia-fast convert nari-labs/Dia-1.6B-0626 dia-original --to original --dtype bf16
  in 8 bits, a quarter of float32
    dia-fast convert nari-labs/Dia-1.6B-0626 dia-int8 --weights int8 --dtype bf16
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="rewrite a checkpoint in another layout",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=path, metavar="SRC", help="Hub repository, local folder or file of weights")
    parser.add_argument("destination", type=path, metavar="DST", help="a new folder")
    parser.add_argument("--to", choices=("transformers", "original"), help="the layout to write")
    parser.add_argument(
        "--weights", help="int8, int8-mlp (in the transformers layout) or float (default: what is stored)"
    )
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: what is stored)")
    parser.add_argument(
        "--pickle", action="store_true", help="write pytorch_model.bin instead of safetensors (original layout only)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of SRC on the Hub")
    parser.add_argument("--offline", action="store_true", help="use only what has been downloaded before")
    return parser


def run(args: argparse.Namespace) -> int:
    import torch

    from dia_fast.checkpoint.saving import convert
    from dia_fast.model.device import choose_dtype

    if args.to is None and args.weights is None:
        raise InputError("say what to write: --to transformers, --to original, or --weights int8")
    layout = args.to or "transformers"
    folder = convert(
        args.source,
        args.destination,
        layout,
        dtype=None if args.dtype is None else choose_dtype(args.dtype, torch.device("cpu")),
        weights=args.weights,
        pickled=args.pickle,
        revision=args.revision,
        local_files_only=args.offline,
    )
    print(f"{folder}: written in the {layout} layout")
    return 0
