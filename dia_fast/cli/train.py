"""`dia-fast train`: a checkpoint and recordings in, a fine-tuned checkpoint out."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from dia_fast.cli.paths import path
from dia_fast.cli.speak import OFFICIAL_MODEL, SMALL_MODEL, set_threads
from dia_fast.errors import InputError

DESCRIPTION = """\
Fine-tunes a checkpoint on recordings and their transcripts.

DATA is a folder, in which a.wav (or .flac, .ogg, .mp3) has its transcript beside it in a.txt; or a JSONL file with one
{"audio": "a.wav", "text": "[S1] What is said."} a line, paths relative to the file. Write transcripts as you would for
`dia-fast speak`: they begin with [S1], speakers alternate, sounds stand in round brackets. Recordings of 5 to 20
seconds are best; longer than the model's 35 seconds they cannot be learnt from. A share of them is held out and tells
whether the model learns or memorises: stop when the loss on it rises.

OUT becomes a folder with
  model/      the checkpoint: for `dia-fast speak --model OUT/model`, and for transformers
  adapter/    after --lora-rank: the adapter alone, for the PEFT library (model/ has it merged in)
  log.jsonl   loss, learning rate and norm of the gradient of every step; evaluations
  loss.png    the same as a picture, if matplotlib is installed: pip install 'dia-fast[train]'
  states/     what --resume needs; a state is three times the size of what is trained, in float32

A run that was interrupted or killed goes on with `dia-fast train -o OUT --resume`, to the same bits on the same CPU and
number of threads as if nothing had happened.
"""

EXAMPLES = f"""\
examples:
  LoRA: trains adapters, 1 % as many numbers as the model has
    dia-fast train recordings --model {OFFICIAL_MODEL} -o voice --lora-rank 16 --dtype bf16 --steps 2000
  all weights, eight examples a step in four parts
    dia-fast train data.jsonl --model {OFFICIAL_MODEL} -o voice --batch-size 2 --accumulate 4 --dtype bf16 --recompute
  go on after Ctrl-C, a kill or a power cut; every option is remembered
    dia-fast train -o voice --resume
  listen
    dia-fast speak "[S1] Is that me?" --model voice/model
"""

# (option, type, metavar, help); a field of `TrainOptions` has the option's name. Only what was given is passed on.
_LEARNING: list[tuple[str, Any, str, str]] = [
    ("steps", int, "N", "optimizer steps"),
    ("batch-size", int, "N", "examples computed at a time"),
    ("accumulate", int, "N", "such batches in each step"),
    ("learning-rate", float, "R", "at its peak (default: 1e-5, with --lora-rank 1e-4)"),
    ("warmup", int, "N", "steps over which the learning rate rises to its peak"),
    ("final-share", float, "S", "share of the peak to which it falls along a cosine"),
    ("weight-decay", float, "W", "of AdamW, on matrices"),
    ("beta1", float, "B", "of AdamW"),
    ("beta2", float, "B", "of AdamW"),
    ("clip", float, "N", "largest norm of the gradient, 0 for any"),
    ("drop-text", float, "P", "probability that an example comes without its text, which guidance needs"),
    ("drop-codes", float, "P", "probability that the decoder reads a random code in the place of the right one"),
    ("seed", int, "N", "decides order, held-out share, what is dropped and new adapters"),
]
_LORA: list[tuple[str, Any, str, str]] = [
    ("lora-rank", int, "R", "train adapters of this rank; 0 trains all weights"),
    ("lora-alpha", float, "A", "their scale is A / R (default: twice the rank)"),
]
_WATCHING: list[tuple[str, Any, str, str]] = [
    ("eval-data", path, "DATA", "held-out recordings, like DATA (default: a share of DATA)"),
    ("eval-share", float, "S", "share of DATA to hold out, 0 for none"),
    ("eval-every", int, "N", "steps between evaluations"),
    ("save-every", int, "N", "steps between states"),
    ("keep", int, "N", "how many states to keep"),
]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="fine-tune a checkpoint on recordings",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("data", type=path, nargs="?", metavar="DATA", help="folder of audio and texts, or JSONL file")
    parser.add_argument(
        "-o", "--output", type=path, required=True, metavar="OUT", help="a new folder; with --resume that of a run"
    )
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in OUT")
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="no progress bar and no summary")

    _add_model(parser.add_argument_group("model"))
    defaults = _defaults()
    for title, options in (("learning", _LEARNING), ("LoRA", _LORA), ("evaluation and states", _WATCHING)):
        group = parser.add_argument_group(title)
        for option, kind, metavar, text in options:
            default = defaults[option.replace("-", "_")]
            shown = "" if default is None else f" (default: {default})"
            group.add_argument(f"--{option}", type=kind, metavar=metavar, help=text + shown)
        if title == "learning":
            group.add_argument(
                "--channel-weights", type=_numbers, metavar="W,W,...", help="of the loss, one per channel (default: 1)"
            )
            group.add_argument(
                "--skip-bad", action="store_true", help="leave out recordings that cannot be used, with a warning"
            )
        elif title == "LoRA":
            group.add_argument(
                "--lora-targets", type=_names, metavar="T,T,...", help=f"of {','.join(defaults['lora_targets'])}"
            )
    parser.argument_default = None  # for what every command gets
    return parser


def _add_model(model: Any) -> None:
    model.add_argument(
        "-m", "--model", type=path, metavar="MODEL", help=f"to begin with: Hub repository or folder: {OFFICIAL_MODEL}"
    )
    model.add_argument(
        "--codec",
        type=path,
        metavar="CODEC",
        help="codec (default: the folder codec in MODEL if it has one, else descript/dac_44khz)",
    )
    model.add_argument("--offline", action="store_true", default=False, help="use only what has been downloaded before")
    model.add_argument("--device", default=None, help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    model.add_argument("--backend", default="auto", help="auto, torch or triton (default: triton on a GPU)")
    model.add_argument(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="of torch on a CPU (default: what torch or OMP_NUM_THREADS says); another number gives other last bits",
    )
    model.add_argument("--dtype", help="of the arithmetic: fp32 or bf16 (default: fp32); what is trained stays fp32")
    model.add_argument("--recompute", action="store_true", help="much less memory for a third more time")
    model.add_argument(
        "--codes",
        type=path,
        default=None,
        metavar="FOLDER",
        help="of encoded sound (default: ~/.cache/dia-fast/codes)",
    )


def run(args: argparse.Namespace) -> int:
    """Check what can be checked, train with a progress bar, and say how to listen to the result."""
    options = {name: value for name, value in vars(args).items() if name in _defaults()}
    if not args.resume:
        if "data" not in options:
            raise InputError("no data: name a folder of audio and texts, or a JSONL file; or --resume a run")
        if "model" not in options:
            raise InputError(f"no model to begin with: name one with --model, as in --model {OFFICIAL_MODEL}")

    set_threads(args.threads, SMALL_MODEL)
    from dia_fast.training import finetune

    watch = Watch(hidden=args.quiet)
    try:
        with watch:
            folder = finetune(
                args.output,
                options,
                resume=args.resume,
                device=args.device,
                backend=args.backend,
                cache=args.codes,
                offline=args.offline,
                quiet=args.quiet or not sys.stderr.isatty(),
                report=lambda line: watch.report(line, Path(args.output)),
            )
    except KeyboardInterrupt:
        if watch.step:
            print(f"dia-fast: go on with: dia-fast train -o {args.output} --resume", file=sys.stderr)
        raise
    if not args.quiet:
        print(f'{folder}: {watch.summary()}; listen: dia-fast speak "[S1] Hello." --model {folder}')
    return 0


class Watch:
    """A progress bar on a terminal, a line per evaluation elsewhere; remembers what the summary says."""

    def __init__(self, hidden: bool) -> None:
        self.hidden, self.step, self.loss, self.eval_loss = hidden, 0, 0.0, None
        self._bar: Any = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, line: dict[str, Any], output: Path) -> None:
        """Show one line of the log of the run in `output`."""
        self.step = line["step"]
        self.loss = line.get("loss", self.loss)
        self.eval_loss = line.get("eval_loss", self.eval_loss)
        if self.hidden:
            return
        if self._bar is None:
            from tqdm import tqdm

            total = json.loads((output / "run.json").read_text(encoding="utf-8"))["options"]["steps"]
            done = self.step - ("loss" in line)
            self._bar = tqdm(
                total=total, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
            )
        self._bar.set_postfix_str(self.summary(), refresh=False)
        if "loss" in line:
            self._bar.update(1)
        elif self._bar.disable:
            print(f"step {self.step} of {self._bar.total}: {self.summary()}", file=sys.stderr, flush=True)

    def summary(self) -> str:
        held_out = "" if self.eval_loss is None else f"held out {self.eval_loss:.3f}"
        if not self.step:
            return held_out or "trained before"
        return f"loss {self.loss:.3f}" + (f", {held_out}" if held_out else "")


def _defaults() -> dict[str, Any]:
    from dia_fast.training.options import TrainOptions

    return {item.name: item.default for item in fields(TrainOptions)}


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


_numbers.__name__, _names.__name__ = "list of numbers", "list of names"  # argparse names them in its errors
