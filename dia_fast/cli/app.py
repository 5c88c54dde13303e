"""Commands, their errors and warnings; nothing heavy is imported before the command is known.

Exit status: 0 done; 2 the input was wrong, said in one line; 1 something else went wrong, or some items of many did;
130 interrupted by Ctrl-C.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import dia_fast
from dia_fast.cli import batch, convert, doctor, info, plan, process, serve, speak, train, voices
from dia_fast.cli.paths import check as check_paths
from dia_fast.cli.process import OutputRefused, drop_output
from dia_fast.errors import AudioWarning, DiaFastError, NumericError, OutOfMemory, SilentSpeech
from dia_fast.text.tokenizer import TextWarning

EXAMPLES = """\
examples:
  dia-fast speak "[S1] Did you hear that? [S2] Hear what?" --model nari-labs/Dia-1.6B-0626 -o out.wav
  dia-fast batch scripts.jsonl spoken --model nari-labs/Dia-1.6B-0626
  dia-fast serve
  dia-fast voices add me recording.wav --text "[S1] These are my words."
  dia-fast info nari-labs/Dia-1.6B-0626
  dia-fast plan --gpu h100
  dia-fast train recordings --model nari-labs/Dia-1.6B-0626 -o voice --lora-rank 16
  dia-fast doctor
  dia-fast convert nari-labs/Dia-1.6B-0626 dia-original --to original

`dia-fast COMMAND --help` explains a command, with examples.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dia-fast",
        description="Dia-1.6B turns a transcript with two speakers into speech.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of dia-fast, Python and torch")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in (speak, batch, serve, voices, train, info, plan, convert, doctor):
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show where an error came from")
        command.set_defaults(run=module.run, parser=command)
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command, as `dia_fast.cli.main` does for a process that is prepared for it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        print(_versions())
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    with warnings.catch_warnings():
        for kind in (TextWarning, AudioWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = _show_warning
        try:
            check_paths(args.parser, args)
            status: int = args.run(args)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            # Whoever read our output has gone; nothing is left to tell, and Python must not complain at exit either.
            drop_output()
            return 0
        except (KeyboardInterrupt, Exception) as error:
            return _fail(args, *_told(error, args))


def _told(error: BaseException, args: argparse.Namespace) -> tuple[str, int]:
    """Return the words for an error, and the exit status."""
    if isinstance(error, KeyboardInterrupt) or process.interrupted:
        return "interrupted", 130
    if isinstance(error, OutputRefused):
        return f"error: cannot write to standard output: {error.strerror or error}", 1
    if isinstance(error, NumericError | SilentSpeech | OutOfMemory):
        return f"error: {in_options(str(error), args)}", 1
    if isinstance(error, DiaFastError):
        return f"error: {in_options(str(error), args)}", 2
    from dia_fast.utils.out_of_memory import out_of_memory

    if (memory := out_of_memory(error)) is not None:
        return f"error: {in_options(str(memory), args)}", 1
    return f"error: {type(error).__name__}: {error} (--debug shows where)", 1


# Arguments of the Python interface whose options have other names.
_OPTIONS = {"local_files_only": "offline", "max_batch": "batch_size", "name_or_path": "model", "do_sample": "greedy"}


def in_options(message: str, args: argparse.Namespace) -> str:
    """An error message with the names of options in the place of those of Python's arguments."""
    options = {name: name for name in vars(args) if name not in ("run", "parser")} | {
        name: other for name, other in _OPTIONS.items() if hasattr(args, other) and not hasattr(args, name)
    }
    # Names with an underscore are no words of English; others are options where they begin the message.
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))

    def spelled(found: re.Match[str]) -> str:
        name = found[0]
        plain = "_" not in name and not (found.start() == 0 and _BEGINS.match(message, found.end()))
        return name if plain else "--" + options[name].replace("_", "-")

    return re.sub(rf"(?<![\w./-])(?:{names})(?![\w/-])", spelled, message)


_BEGINS = re.compile(r" must|:| '| is unknown")


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    if args.debug:
        raise
    print("dia-fast: " + " ".join(message.split()), file=sys.stderr)
    return status


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    name = "" if issubclass(category, TextWarning | AudioWarning) else f" {category.__name__}:"
    line = f"dia-fast: warning:{name} {' '.join(str(message).split())}"
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)  # above a progress bar, not into it
    else:
        print(line, file=sys.stderr)


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = f"torch {version('torch')}"
    except PackageNotFoundError:
        torch = "no torch"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"dia-fast {dia_fast.__version__} (Python {python}, {torch})"
