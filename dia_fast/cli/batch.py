"""`dia-fast batch`: a file of scripts in, a folder of audio files out."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dia_fast.checkpoint.demo import located
from dia_fast.cli import process
from dia_fast.cli.paths import path
from dia_fast.cli.speak import OFFICIAL_MODEL, add_model, add_sampling, params_from, set_threads
from dia_fast.errors import CheckpointError, InputError
from dia_fast.generation.sampling_params import SamplingParams, random_seed

if TYPE_CHECKING:
    from dia_fast.api import Dia
    from dia_fast.jobs.items import Item
    from dia_fast.jobs.runner import Batch, Spoken
    from dia_fast.utils.progress import ItemBar

DESCRIPTION = """\
Speaks many scripts, several at a time, and writes one audio file for each and a manifest.

INPUT is a JSON Lines file: one object a line, with
  text         the script, with speaker tags; the only field that must be there
  id           names the file (letters, digits, dots, dashes, underscores); default: the number of the line
  prompt       a recording of the voice to speak in, relative to the folder of INPUT, or the name of a saved voice
  prompt_text  what is said in it, with speaker tags
  seed         default: made from --seed and the id, so that each item has its own and keeps it
  split        "auto" to cut a script that is too long for the model into segments, null not to; default: --split
  max_new_tokens, guidance_scale, temperature, top_p, top_k, do_sample
               as the options below, which hold for the lines that do not say otherwise
"""

EPILOG = f"""\
A line that cannot be used, or an item that fails, is reported and written to the manifest; the others go on, and the
exit status is 1. FOLDER/manifest.jsonl has a line for each item with its status, file, duration, seed and sampling
parameters.

However a run ends, the same command goes on where it was: items that are done are not done again, those that failed
are tried again, and an item whose text, voice, seed, sampling, model or codec has changed is done again, over its old
file. No file is ever half-written. The result is that of a run without interruption, byte for byte (wav and flac, on
the same machine), except for the order of the manifest's lines until a run gets to its end.

examples:
  a file with two scripts, checked, then spoken
    echo '{{"id": "hello", "text": "[S1] Hello. [S2] Hi there."}}' > scripts.jsonl
    echo '{{"id": "again", "text": "[S1] My voice.", "prompt": "me.wav", "prompt_text": "[S1] Me."}}' >> scripts.jsonl
    dia-fast batch scripts.jsonl spoken --dry-run
    dia-fast batch scripts.jsonl spoken --model {OFFICIAL_MODEL}
  other voices for all, as FLAC; 32 at a time, with at most 20 GB for keys and values
    dia-fast batch scripts.jsonl spoken-2 --model ... --seed 2 --format flac --batch-size 32 --memory 20GB
  on the machines of a Ray cluster; this process alone writes
    dia-fast batch scripts.jsonl spoken --model {OFFICIAL_MODEL} --ray 10.0.0.1:6379
  what failed, and why
    grep '"failed"' spoken/manifest.jsonl
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="speak many scripts from a file, resumably",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=path, metavar="INPUT", help="JSON Lines file, or its URL as s3://bucket/in.jsonl")
    parser.add_argument("folder", type=path, metavar="FOLDER", help="where to write, or a URL; made if it is missing")
    parser.add_argument("--dry-run", action="store_true", help="check every line and prompt; load and write nothing")
    parser.add_argument("--format", default="wav", choices=("wav", "flac", "ogg", "mp3"), help="default: %(default)s")
    parser.add_argument(
        "--split", default="auto", choices=("auto", "none"), help="cut scripts of more than 20 s (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=16, help="scripts, or segments, at a time, 1 to 32 (%(default)s)"
    )
    parser.add_argument(
        "--memory", metavar="BYTES", help="for keys and values, as in 4GB (default: up to half of what is free)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary; failures are told")
    cluster = parser.add_argument_group("Ray", 'Spread the items over a cluster; needs the extra "ray".')
    cluster.add_argument(
        "--ray", metavar="ADDRESS", help='HOST:PORT, ray://HOST:PORT, "auto", or "local" for one on this machine alone'
    )
    cluster.add_argument(
        "--actors", type=int, metavar="N", help="engines (default: one a GPU; without GPUs as many as CPUs allow)"
    )
    cluster.add_argument(
        "--cpus-per-actor", type=float, default=1.0, metavar="N", help="which each reserves, and its threads (1)"
    )
    cluster.add_argument(
        "--gpus-per-actor", type=float, metavar="N", help="which each reserves (default: 1 where there are GPUs)"
    )
    add_model(parser)
    add_sampling(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check every line first, then load the model if anything is to be done."""
    from dia_fast.generation.inputs import engine_limits
    from dia_fast.jobs.items import Defaults, identity_of, read_items
    from dia_fast.jobs.runner import Batch
    from dia_fast.jobs.store import Folder, RemoteFolder, fetched, is_url

    args.seed = random_seed() if args.seed == -1 else args.seed or 0
    params_from(args, SamplingParams())
    engine_limits(args.batch_size, args.memory)
    if args.ray is None and (args.actors is not None or args.gpus_per_actor is not None):
        raise InputError("--actors and --gpus-per-actor are for --ray ADDRESS")
    if args.model is None and not args.dry_run:
        raise InputError(f"no model: name one with --model, as in --model {OFFICIAL_MODEL}, or --model demo")
    made_with = {"model": args.model, "codec": args.codec, "revision": args.revision, "dtype": args.dtype}
    if args.codec_dtype is not None:
        made_with["codec_dtype"] = args.codec_dtype
    usual, identity = params_from(args, SamplingParams()), ""
    if args.model:
        identity = identity_of(located(args.model)) + identity_of(args.codec)
    defaults = Defaults(usual, args.split == "auto", args.format, made_with, identity)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(fetched(args.input)) if is_url(args.input) else Path(args.input)
        folder: Path | Folder = Path(args.folder)
        if is_url(args.folder):
            folder = stack.enter_context(RemoteFolder(args.folder))
        batch = Batch(read_items(source, defaults), folder)
        if args.model is not None and (params := params_from(args, _defaults(args))) != usual:
            batch = Batch(read_items(source, replace(defaults, params=params)), folder)
        if args.dry_run:
            return _dry_run(batch, told_model=args.model is not None)
        return _run(batch, args)


def _defaults(args: argparse.Namespace) -> SamplingParams:
    """The checkpoint's sampling parameters; a dry run downloads nothing, and takes the usual ones for a new model."""
    from dia_fast.checkpoint.loading import open_checkpoint

    try:
        local = args.offline or args.dry_run
        return open_checkpoint(args.model, revision=args.revision, local_files_only=local).defaults
    except CheckpointError:
        if args.dry_run:
            return SamplingParams()
        raise


def _dry_run(batch: "Batch", *, told_model: bool) -> int:
    failures = batch.check()
    for failed in failures:
        print(_failure(failed.line, failed.id, failed.error), file=sys.stderr)
    left = f"{len(batch.pending)} to do, {batch.before} done before" if told_model else f"{len(batch.items)} items"
    print(f"{left}, {len(failures)} that cannot be used; nothing was written")
    return 1 if failures else 0


def _run(batch: "Batch", args: argparse.Namespace) -> int:
    from dia_fast.generation.inputs import FRAMES_PER_SECOND
    from dia_fast.jobs.runner import Totals
    from dia_fast.utils.progress import ItemBar

    hidden = args.quiet or not sys.stderr.isatty()
    with ItemBar(len(batch.items), batch.before, FRAMES_PER_SECOND, hidden=hidden) as bar:

        def stepped(rows: int) -> None:
            process.check()  # a step may have swallowed it
            bar.stepped(rows)

        def ended(totals: Totals, entry: dict[str, Any]) -> None:
            process.check()  # an item may have failed by it
            if entry["status"] == "failed":
                bar.ended(_failure(entry["line"], entry["id"], entry["error"]))
            else:
                remarks = [f"dia-fast: warning: {entry['id']}: {remark}" for remark in entry["remarks"]]
                bar.ended("\n".join(remarks) or None)

        try:
            if args.ray is None:
                totals = batch.run(lambda: _load(vars(args)), begun=bar.restart, stepped=stepped, ended=ended)
            else:
                totals = batch.run_on(_on_ray(args, bar), ended=ended)
        except KeyboardInterrupt:
            bar.tell("dia-fast: what is done stays; the same command goes on from here")
            raise
        seconds = bar.seconds
    if not args.quiet:
        partial = f", {totals.partial} partial" if totals.partial else ""
        before = f" ({totals.before} of them before)" if totals.before else ""
        print(
            f"{args.folder}: {totals.done + totals.before} of {len(batch.items)} items done{before}, {totals.failed} "
            f"failed{partial}; {totals.seconds:.2f} s of sound in {seconds:.1f} s "
            f"({totals.seconds / seconds:.2f}x realtime)"
        )
    return 1 if totals.failed or totals.partial else 0


def _load(options: Mapping[str, Any], default_threads: int | None = None) -> "Dia":
    """The model as the command line names it."""
    from dia_fast.api import Dia
    from dia_fast.model.fused_weights import parameter_count

    dia = Dia.from_pretrained(
        options["model"],
        device=options["device"],
        dtype=options["dtype"],
        weights=options["weights"],
        backend=options["backend"],
        codec=options["codec"],
        codec_dtype=options["codec_dtype"],
        revision=options["revision"],
        local_files_only=options["offline"],
        max_batch=options["batch_size"],
        memory=options["memory"],
    )
    set_threads(default_threads if options["threads"] is None else options["threads"], parameter_count(dia.config))
    return dia


def _on_ray(args: argparse.Namespace, bar: "ItemBar") -> "Callable[[Sequence[Item]], Generator[Spoken, None, None]]":
    """Make the function that speaks items on the actors of a cluster, which get nothing but the model's options."""
    from dia_fast.jobs.ray_pool import PoolOptions, speak_on_ray

    names = "model device dtype weights backend codec codec_dtype revision offline batch_size memory threads".split()
    load = partial(_load, {name: getattr(args, name) for name in names}, max(1, int(args.cpus_per_actor)))
    options = PoolOptions(args.ray, args.actors, args.cpus_per_actor, args.gpus_per_actor)

    def told(message: str) -> None:
        if not args.quiet:
            bar.tell(f"dia-fast: {message}")

    def speak(items: "Sequence[Item]") -> "Generator[Spoken, None, None]":
        return speak_on_ray(items, load, options, begun=bar.restart, stepped=bar.stepped, told=told)

    return speak


def _failure(line: int, identity: str | None, error: str) -> str:
    name = "" if identity is None else f" ({identity})"
    return f"dia-fast: line {line}{name}: {' '.join(error.split())}"
