"""`dia-fast speak`: a transcript in, an audio file out."""

import argparse
import codecs
import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dia_fast.errors import InputError
from dia_fast.settings import SamplingSettings, random_seed
from dia_fast.text import ABSURD_BYTES, TextWarning, checked_text, join_prompt

if TYPE_CHECKING:
    from dia_fast.api import Dia
    from dia_fast.audio import Audio, Samples
    from dia_fast.progress import StepBar

OFFICIAL_MODEL = "nari-labs/Dia-1.6B-0626"

STANDARD_OUTPUT = Path("-")
SILENCE = "the model ended the speech before it began: try another seed or text"

DESCRIPTION = """\
Speaks a transcript and writes it to an audio file.

Mark the speakers with [S1] and [S2]: begin with [S1] and alternate. Sounds such as (laughs) or (coughs) are written in
round brackets. The model speaks 5 to 20 seconds well (some 75 to 300 characters); a longer transcript is cut at turns
and sentences into pieces of about 9 seconds, each in the voices of the last or of --prompt, and joined.
"""

EXAMPLES = f"""\
examples:
  a dialogue
    dia-fast speak "[S1] Did you hear that? [S2] Hear what?" --model {OFFICIAL_MODEL} -o out.wav
  from a file, and from another program, as FLAC
    dia-fast speak --file dialogue.txt --model {OFFICIAL_MODEL} -o out.flac
    fortune | sed 's/^/[S1] /' | dia-fast speak --model {OFFICIAL_MODEL} -o out.flac
  in the voice of a recording (5 to 10 seconds) and its transcript
    dia-fast speak "And this is new." --prompt me.wav --prompt-text "[S1] These are my words." --model ...
  hear it while it is spoken: 16-bit mono samples at 44.1 kHz on standard output
    dia-fast speak --file dialogue.txt --model ... --stream -o - | aplay -f S16_LE -r 44100 -c 1
    ... --stream -o - | ffplay -nodisp -autoexit -f s16le -sample_rate 44100 -
  the same again: the seed of a run is in its last line
    dia-fast speak --file dialogue.txt --model ... --seed 1234
"""


@dataclass(frozen=True)
class Made:
    """What was spoken. seconds: of sound; first: seconds until the first piece was written, where there were pieces."""

    seconds: float
    seed: int | None
    first: float | None = None


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "speak",
        help="speak a transcript into an audio file",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the transcript (default: standard input)")
    parser.add_argument("-f", "--file", metavar="PATH", help="read the transcript from a UTF-8 file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        default="out.wav",
        help="where to write; the extension picks wav, flac, ogg or mp3 (default: %(default)s); - with --stream "
        "is standard output",
    )
    parser.add_argument(
        "--split",
        default="auto",
        choices=("auto", "none"),
        help="auto: cut a transcript of more than 20 s into pieces; not with --stream (%(default)s)",
    )
    parser.add_argument("--stream", action="store_true", help="write the sound while it is generated")
    parser.add_argument("--chunk-seconds", type=float, metavar="S", help="how much sound at a time with --stream (0.5)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary")

    voice = parser.add_argument_group("voice")
    voice.add_argument("--prompt", metavar="AUDIO", help="recording of the voice to speak in, 5 to 10 seconds")
    voice.add_argument("--prompt-text", metavar="TEXT", help="what is said in it, with speaker tags")

    add_model(parser)
    add_sampling(parser)
    parser.set_defaults(temperature=None)  # it depends on the model
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", metavar="MODEL", help=f"Hub repository or local folder: {OFFICIAL_MODEL}")
    model.add_argument(
        "--codec",
        metavar="CODEC",
        default="auto",
        help="codec (default: the folder codec in MODEL if it has one, else descript/dac_44khz)",
    )
    model.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    model.add_argument("--offline", action="store_true", help="use only what has been downloaded before")
    model.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    model.add_argument("--dtype", help="fp32, bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)")
    model.add_argument("--backend", default="auto", help="auto, torch or triton (default: triton on a GPU)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    usual = SamplingSettings()
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=usual.max_new_tokens,
        help="longest result, in steps of 1/86 s (%(default)s)",
    )
    group.add_argument(
        "--guidance-scale",
        type=_none_or(float),
        metavar="S",
        default=usual.guidance_scale,
        help="how closely to follow the text, 1 or more; 1 or none turns guidance off (%(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=usual.temperature,
        help=f"higher is more varied ({usual.temperature}; speak without --model: 0.5)",
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", default=usual.top_p, help="share of probability to draw from (%(default)s)"
    )
    group.add_argument(
        "--top-k", type=_none_or(int), metavar="K", default=usual.top_k, help="candidates, none for all (%(default)s)"
    )
    group.add_argument("--greedy", action="store_true", help="always take the likeliest code")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed speaks the same way (default: random)")


def _none_or(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def settings_from(args: argparse.Namespace) -> SamplingSettings:
    """What was asked for; a temperature that was not is that of the model."""
    if args.temperature is None:
        from dia_fast.voice import TEMPERATURE

        args.temperature = TEMPERATURE if args.model is None else SamplingSettings().temperature
    return SamplingSettings(
        max_new_tokens=args.max_new_tokens,
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        do_sample=not args.greedy,
        seed=random_seed() if args.seed is None else args.seed,
    )


def transcript(args: argparse.Namespace) -> str:
    """The text of the arguments, of a file or of standard input, checked.

    Raises InputError: two sources or none, an unreadable file, and whatever `checked_text` refuses.
    """
    if args.text is not None and args.file is not None:
        raise InputError("both TEXT and --file are given: which one is to be spoken?")
    if args.text is not None:
        return checked_text(args.text)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError('no text: write it as an argument, as in dia-fast speak "[S1] Hello.", or use --file')
    if args.file in (None, "-"):
        data = sys.stdin.buffer.read(ABSURD_BYTES + 1)
    else:
        try:
            with open(args.file, "rb") as file:
                data = file.read(ABSURD_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot read the text file {args.file}: {error.strerror}") from error
    return checked_text(data.removeprefix(codecs.BOM_UTF8)).strip()


def check_output(path: Path) -> None:
    """Finds out before the work, not after it, that the file cannot be written. Leaves nothing behind.

    Raises InputError: unknown extension, missing or unwritable folder, a folder of that name.
    """
    from dia_fast.audio import FORMATS

    if path == STANDARD_OUTPUT:
        raise InputError("-o - writes the sound to standard output while it is generated: it needs --stream")
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: its extension must be one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def run(args: argparse.Namespace) -> int:
    """Checks whatever can be checked without the model first, then loads, speaks and writes."""
    settings = settings_from(args)
    text = transcript(args)
    if args.prompt_text is not None and args.prompt is None:
        raise InputError("--prompt-text needs --prompt: the recording in which it is said")
    if args.prompt is not None and args.prompt_text is None:
        warnings.warn(
            "--prompt without --prompt-text: TEXT must then begin with what is said in the recording",
            TextWarning,
            stacklevel=1,
        )
    if args.prompt_text is not None:
        whole = join_prompt(args.prompt_text, text)
        text = whole if args.stream else text
    if args.prompt is not None and not Path(args.prompt).is_file():
        raise InputError(f"--prompt {args.prompt}: no such file")
    output = Path(args.output)
    if args.chunk_seconds is not None and not args.stream:
        raise InputError("--chunk-seconds needs --stream: without it the sound is written in one piece")
    if not args.stream or output != STANDARD_OUTPUT:
        check_output(output)
    elif sys.stdout.isatty():
        raise InputError("-o - writes bare samples, and standard output is a terminal: send them to a player or a file")
    if args.model is None:
        args.model = _demo_voice(text, quiet=args.quiet)
    return _speak(args, settings, text, output)


def _demo_voice(text: str, *, quiet: bool) -> Path:
    """The voice that speaks where no model is named; says so, and warns of words that it cannot say."""
    from dia_fast.voice import demo_voice, unknown_words, vocabulary

    folder = demo_voice()
    if not quiet:
        print(
            f"dia-fast: no --model: this is the demo voice of the package, which knows {len(vocabulary())} words and "
            f"two synthetic speakers ({folder / 'README.md'}); for anything else: --model {OFFICIAL_MODEL}",
            file=sys.stderr,
        )
    if unknown := unknown_words(text):
        few = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        told = f"the demo voice never learnt: {few}; its words: {folder / 'vocabulary.txt'}"
        warnings.warn(told, TextWarning, stacklevel=1)
    return folder


def _speak(args: argparse.Namespace, settings: SamplingSettings, text: str, output: Path) -> int:
    from dia_fast.api import Dia
    from dia_fast.arguments import FRAMES_PER_SECOND
    from dia_fast.progress import StepBar

    dia = Dia.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        codec=args.codec,
        revision=args.revision,
        local_files_only=args.offline,
    )
    dia.codec, dia.engine  # noqa: B018 (made now, so that the clock below does not count it)
    # One step more than rows: the last one only puts the last row in its place.
    total = min(settings.max_new_tokens, dia.config.decoder.max_position_embeddings) + 1
    with StepBar(total, FRAMES_PER_SECOND, hidden=args.quiet or not sys.stderr.isatty()) as bar:
        made = (_speak_piecewise if args.stream else _speak_at_once)(dia, args, settings, text, output, bar)
    if not args.quiet:
        print(summary(made, bar, output), file=sys.stderr if output == STANDARD_OUTPUT else sys.stdout)
    return 0


def _speak_at_once(
    dia: "Dia", args: argparse.Namespace, settings: SamplingSettings, text: str, output: Path, bar: "StepBar"
) -> Made:
    # Without its transcript nobody knows where a recording's words end in the text, and cuts may not fall among them.
    split = "auto" if args.split == "auto" and (args.prompt is None or args.prompt_text is not None) else None
    voice = {"audio_prompt": args.prompt, "prompt_text": args.prompt_text}
    [audio] = cast("list[Audio]", dia.generate([text], **voice, split=split, progress=bar, **asdict(settings)))
    if not audio.duration:
        raise InputError(SILENCE)
    audio.save(output)
    return Made(audio.duration, settings.seed)


def _speak_piecewise(
    dia: "Dia", args: argparse.Namespace, settings: SamplingSettings, text: str, output: Path, bar: "StepBar"
) -> Made:
    from dia_fast.audio import growing_file

    start, seconds, first = time.perf_counter(), 0.0, None
    options = {} if args.chunk_seconds is None else {"chunk_seconds": args.chunk_seconds}
    chunks = dia.stream(text, audio_prompt=args.prompt, progress=bar, **options, **asdict(settings))
    sink = samples_to_stdout() if output == STANDARD_OUTPUT else growing_file(output, dia.codec.sample_rate)
    with sink as write, contextlib.closing(chunks):
        for chunk in chunks:
            write(chunk.samples)
            seconds += chunk.duration
            first = first or time.perf_counter() - start
        if not seconds:
            raise InputError(SILENCE)
    return Made(seconds, settings.seed, first)


@contextlib.contextmanager
def samples_to_stdout() -> Iterator[Callable[["Samples"], None]]:
    """Yields what writes samples to standard output as 16-bit little-endian integers, at once."""
    from dia_fast.audio import pcm16

    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as raw:

        def write(samples: "Samples") -> None:
            left = memoryview(pcm16(samples))
            try:
                while left:
                    left = left[raw.write(left) :]
            except BrokenPipeError:
                raise
            except OSError as error:
                raise InputError(f"cannot write to standard output: {error.strerror or error}") from error

        yield write


def summary(made: Made, bar: "StepBar", output: Path) -> str:
    """One line: what was made, how fast, and how to make it again."""
    rate = bar.steps / bar.seconds
    first = "" if made.first is None else f"first sound after {made.first:.2f} s, "
    name = "standard output" if output == STANDARD_OUTPUT else output
    return (
        f"{name}: {made.seconds:.2f} s of sound, {bar.steps} steps in {bar.seconds:.1f} s ({rate:.1f} steps/s, "
        f"{made.seconds / bar.seconds:.2f}x realtime), {first}seed {made.seed}"
    )
