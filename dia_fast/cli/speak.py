"""`dia-fast speak`: a transcript in, an audio file out."""

import argparse
import codecs
import contextlib
import os
import struct
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dia_fast.cli import process
from dia_fast.cli.paths import path
from dia_fast.errors import InputError, SilentSpeech
from dia_fast.generation.sampling_params import CHECKPOINT, SamplingParams, named_seed, random_seed
from dia_fast.text.tokenizer import ABSURD_BYTES, TextWarning, checked_text, join_prompt, spoken_seconds, with_tag
from dia_fast.utils.files import NOT_REGULAR, open_regular, writable
from dia_fast.utils.warn import warn

if TYPE_CHECKING:
    from dia_fast.api import Dia
    from dia_fast.audio.audio import Audio, Samples
    from dia_fast.generation.outcome import Outcome
    from dia_fast.utils.progress import StepBar

OFFICIAL_MODEL = "nari-labs/Dia-1.6B-0626"

STANDARD_OUTPUT = Path("-")
SEGMENT_CHARACTERS, MOST_AT_ONCE = 100, 32  # a segment of a long text has no fewer characters, mostly
# Weights. Beside other work on two cores, two threads took 3, 6 and 8 times as long as one for a step of 7, 19 and 63
# million (`python -m bench.threads`). Where a second thread begins to gain on a machine at rest has not been measured.
SMALL_MODEL = 50_000_000
SAMPLING = ("max_new_tokens", "guidance_scale", "temperature", "top_p", "top_k", "retries")

DESCRIPTION = """\
Speaks a transcript and writes it to an audio file.

Mark the speakers with [S1] and [S2]: begin with [S1] and alternate. Sounds such as (laughs) or (coughs) are written in
round brackets. The model speaks 5 to 20 seconds well (some 75 to 300 characters); a longer transcript is cut at turns
and sentences into segments of about 9 seconds, each in the voices of the last or of --prompt, and joined.
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
  hear it while it is spoken: as WAV, which tells the player its rate, or bare 16-bit mono samples
    dia-fast speak --file dialogue.txt --model ... --stream -o - --format wav | aplay
    ... --stream -o - --format wav | ffplay -nodisp -autoexit -
    ... --stream -o - | aplay -f S16_LE -c 1 -r 44100      the rate of the official model; the last line tells it
  the same again: the seed of a run is in its last line
    dia-fast speak --file dialogue.txt --model ... --seed 1234
"""


@dataclass(frozen=True)
class Made:
    """A finished recording. seconds: of sound; first: seconds until the first chunk was written, of a stream."""

    seconds: float
    seed: int | None
    first: float | None = None
    outcome: "Outcome | None" = None


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "speak",
        help="speak a transcript into an audio file",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the transcript (default: standard input)")
    parser.add_argument("-f", "--file", type=path, metavar="PATH", help="read the transcript from a UTF-8 file")
    parser.add_argument(
        "-o",
        "--output",
        type=path,
        metavar="PATH",
        default="out.wav",
        help="where to write; the extension picks wav, flac, ogg or mp3 (default: %(default)s); - with --stream "
        "is standard output",
    )
    parser.add_argument(
        "--split",
        default="auto",
        choices=("auto", "none"),
        help="auto: cut a transcript of more than 20 s into segments (%(default)s)",
    )
    parser.add_argument("--stream", action="store_true", help="write the sound while it is generated")
    parser.add_argument(
        "--format", choices=("raw", "wav"), help="of -o -: bare 16-bit samples, or with a WAV header first (raw)"
    )
    parser.add_argument("--chunk-seconds", type=float, metavar="S", help="how much sound at a time with --stream (0.5)")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="0.25 to 4, at the same pitch (1)")
    parser.add_argument("--trim-silence", action="store_true", help="cut silence at the ends, and long silence inside")
    parser.add_argument("--add-tag", action="store_true", help="put [S1] before a transcript that has no tag there")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary")
    parser.add_argument("--words", action="store_true", help="show the words that the demo voice knows, and do no more")

    voice = parser.add_argument_group("voice")
    voice.add_argument("--prompt", type=path, metavar="AUDIO", help="the voice to speak in, 5 to 10 s, or its name")
    voice.add_argument("--cut-prompt", action="store_true", help="use the best 10 to 20 seconds of a longer recording")
    voice.add_argument("--prompt-text", metavar="TEXT", help="what is said in it, with speaker tags")

    add_model(parser)
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="texts at a time, 1 to 32 (1, or the segments in the voice of --prompt)",
    )
    memory.add_argument("--memory", metavar="BYTES", help="most for keys and values, as in 4GB (what is needed)")
    add_sampling(parser)
    return parser


def _seed(given: str) -> int:
    try:
        return int(given)
    except ValueError:
        return named_seed(given)


def add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model", type=path, metavar="MODEL", help=f"Hub repository, folder, adapter, or demo: {OFFICIAL_MODEL}"
    )
    model.add_argument(
        "--codec",
        type=path,
        metavar="CODEC",
        default="auto",
        help="codec (default: the folder codec in MODEL if it has one, else descript/dac_44khz)",
    )
    model.add_argument("--codec-dtype", help="of the codec, fp32 or fp16, which is for GPUs (default: fp32)")
    model.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    model.add_argument("--offline", action="store_true", help="use only what has been downloaded before")
    model.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    model.add_argument("--dtype", help="fp32, bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)")
    model.add_argument(
        "--weights", help="int8, int8-mlp or float: keep matrices in 8 bits or not (default: what MODEL holds)"
    )
    model.add_argument("--backend", default="auto", help="auto, torch or triton (default: triton on a GPU)")
    add_threads(model)


def add_threads(group: Any) -> None:
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help=f"of torch on a CPU (default: 1 for a model of less than {SMALL_MODEL // 10**6} million weights, as "
        "threads that wait for each other lose much on a busy machine: with 19 million and two threads, 240 ms a step "
        "instead of 38; else what torch or OMP_NUM_THREADS says)",
    )


def set_threads(threads: int | None, parameters: int) -> None:
    """Set torch's threads for this process, as `--threads` says or the size of the model."""
    import torch

    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1, not {threads}")
    if threads is None and parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    usual = SamplingParams()
    parser.set_defaults(**dict.fromkeys(SAMPLING, CHECKPOINT))
    group = parser.add_argument_group(
        "sampling",
        "Defaults are those of the model's generation_config.json; in brackets, those of the official model.",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest result, in steps of 1/86 s ({usual.max_new_tokens})",
    )
    group.add_argument(
        "--guidance-scale",
        type=_none_or(float),
        metavar="S",
        help=f"how closely to follow the text, 1 or more; 1 or none turns guidance off ({usual.guidance_scale})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"higher is more varied ({usual.temperature}; demo: 0.5)",
    )
    group.add_argument("--top-p", type=float, metavar="P", help=f"share of probability to draw from ({usual.top_p})")
    group.add_argument("--top-k", type=_none_or(int), metavar="K", help=f"candidates, none for all ({usual.top_k})")
    group.add_argument("--greedy", action="store_true", help="always take the likeliest code")
    group.add_argument(
        "--seed",
        type=_seed,
        metavar="N",
        help="the same seed, or name, speaks the same way (default or -1: random)",
    )
    group.add_argument(
        "--retries", type=int, metavar="N", help=f"more attempts at a silent segment, other seeds ({usual.retries})"
    )


def _none_or(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def params_from(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The defaults, with what was asked for in their place. Raises InputError."""
    return defaults.given(
        **{name: getattr(args, name) for name in SAMPLING},
        do_sample=False if args.greedy else CHECKPOINT,
        seed=CHECKPOINT if args.seed is None else args.seed,
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
        if sys.stdin is None:
            raise InputError("--file -: standard input is closed")
        data = sys.stdin.buffer.read(ABSURD_BYTES + 1)
    else:
        try:
            with open_regular(args.file) as file:
                data = file.read(ABSURD_BYTES + 1)
        except OSError as error:
            hint = "; send the text to standard input instead" if error.strerror == NOT_REGULAR else ""
            raise InputError(f"cannot read the text file {args.file}: {error.strerror}{hint}") from error
    return checked_text(data.removeprefix(codecs.BOM_UTF8)).strip()


def check_output(output: Path) -> None:
    """Find out before the work, not after it, that the file cannot be written. Leaves nothing behind.

    Raises InputError: unknown extension, missing or unwritable folder, a folder of that name.
    """
    from dia_fast.audio.audio import FORMATS

    if output == STANDARD_OUTPUT:
        raise InputError("-o - writes the sound to standard output while it is generated: it needs --stream")
    if output.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {output}: its extension must be one of {', '.join(FORMATS)}")
    writable(output)


def check_prompt(prompt: str) -> None:
    """Find out that a recording is not there before the model is loaded. Raises InputError."""
    from dia_fast.generation.voices import find_voice, missing

    if not os.path.exists(prompt) and find_voice(prompt) is not None:
        return
    try:
        open_regular(os.path.expanduser(prompt)).close()
    except FileNotFoundError:
        raise InputError(f"--prompt {missing(prompt)}") from None
    except OSError as error:
        raise InputError(f"--prompt {prompt}: {error.strerror or error}") from error


def run(args: argparse.Namespace) -> int:
    """Check whatever can be checked without the model first, then load, speak and write."""
    if args.words:
        _print_words(args.model)
        return 0
    args.seed = random_seed() if args.seed in (None, -1) else args.seed
    params_from(args, SamplingParams())
    text = transcript(args)
    text = cast("str", with_tag(text)) if args.add_tag else text
    if args.prompt_text is not None and args.prompt is None:
        raise InputError("--prompt-text needs --prompt: the recording in which it is said")
    if args.prompt is not None and args.prompt_text is None and not os.path.exists(args.prompt):
        from dia_fast.generation.voices import find_voice

        saved = find_voice(args.prompt)
        args.prompt_text = None if saved is None else saved.text
    if args.prompt is not None and args.prompt_text is None:
        warn(
            "--prompt without --prompt-text: TEXT must then begin with what is said in the recording",
            TextWarning,
        )
    if args.prompt_text is not None:
        join_prompt(args.prompt_text, text)
    if args.prompt is not None:
        check_prompt(args.prompt)
    output = Path(args.output)
    from dia_fast.audio.editing import checked_speed

    if args.stream and (args.speed != 1 or args.trim_silence or args.cut_prompt):
        raise InputError("--speed, --trim-silence and --cut-prompt need the whole sound: leave --stream out")
    checked_speed(args.speed)
    if args.chunk_seconds is not None and not args.stream:
        raise InputError("--chunk-seconds needs --stream: without it the sound is written in one piece")
    if not args.stream or output != STANDARD_OUTPUT:
        check_output(output)
    elif "stdout" in process.closed:
        raise InputError("-o - writes to standard output, and that is closed: send it to a player or a file")
    elif sys.stdout.isatty():
        raise InputError("-o - writes bare samples, and standard output is a terminal: send them to a player or a file")
    if args.format is not None and output != STANDARD_OUTPUT:
        raise InputError("--format is for -o -; elsewhere the extension of the file picks the format")
    if args.model in (None, "demo"):
        _tell_demo_voice(text, quiet=args.quiet or args.model is not None)
        args.model = "demo"
    return _speak(args, text, output)


def _tell_demo_voice(text: str, *, quiet: bool) -> None:
    """Say that the demo voice speaks, unless quiet, and warn of words that it cannot say."""
    from dia_fast.checkpoint.demo import demo_voice, unknown_words_remark, vocabulary

    folder = demo_voice()
    if not quiet:
        print(
            f"dia-fast: no --model: this is the demo voice of the package, which knows {len(vocabulary())} words and "
            f"two synthetic speakers ({folder / 'README.md'}); for anything else: --model {OFFICIAL_MODEL}",
            file=sys.stderr,
        )
    if remark := unknown_words_remark(text):
        warn(f"{remark}; dia-fast speak --words shows all that it knows", TextWarning)


def _print_words(model: str | None) -> None:
    """Print the words of the demo voice, wrapped. Raises InputError for another model."""
    from dia_fast.checkpoint.demo import DEMO, vocabulary

    if model not in (None, DEMO):
        raise InputError(f"--words shows the words of the demo voice; {model} takes any text")
    print(textwrap.fill(" ".join(vocabulary()), 100, break_on_hyphens=False))


def at_once(args: argparse.Namespace, text: str) -> int:
    """Count the sequences that run at a time: one, unless segments of a text need not wait for each other."""
    if args.max_batch is not None:
        return int(args.max_batch)
    if args.split == "none" or args.prompt_text is None:
        return 1
    return min(2 if args.stream else MOST_AT_ONCE, 1 + len(text) // SEGMENT_CHARACTERS)


def _speak(args: argparse.Namespace, text: str, output: Path) -> int:
    from dia_fast.api import Dia
    from dia_fast.generation.inputs import expected_steps
    from dia_fast.model.fused_weights import parameter_count
    from dia_fast.utils.progress import StepBar

    dia = Dia.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        backend=args.backend,
        codec=args.codec,
        codec_dtype=args.codec_dtype,
        revision=args.revision,
        local_files_only=args.offline,
        max_batch=at_once(args, text),
        memory=args.memory,
    )
    params = params_from(args, dia.defaults)
    set_threads(args.threads, parameter_count(dia.config))
    dia.codec, dia.engine  # noqa: B018 (made now, so that the clock below does not count it)
    total = expected_steps(dia.config, spoken_seconds(text), params.max_new_tokens, dia.codec.frames_per_second)
    with StepBar(total, dia.codec.frames_per_second, hidden=args.quiet or not sys.stderr.isatty()) as bar:
        made = (_speak_piecewise if args.stream else _speak_at_once)(dia, args, params, text, output, bar)
    if not args.quiet:
        print(
            summary(made, bar, output, dia.codec.sample_rate),
            file=sys.stderr if output == STANDARD_OUTPUT else sys.stdout,
        )
    if made.outcome is not None and made.outcome.silent:
        print(f"dia-fast: error: {_lost(made.outcome)}", file=sys.stderr)
        return 1
    return 0


def script_options(args: argparse.Namespace) -> dict[str, Any]:
    """The voice of a script, and whether it may be cut into segments."""
    # Without its transcript nobody knows where a recording's words end in the text, and cuts may not fall among them.
    split = "auto" if args.split == "auto" and (args.prompt is None or args.prompt_text is not None) else None
    return {"audio_prompt": args.prompt, "prompt_text": args.prompt_text, "split": split}


def _speak_at_once(
    dia: "Dia", args: argparse.Namespace, params: SamplingParams, text: str, output: Path, bar: "StepBar"
) -> Made:
    script = script_options(args)
    editing = {"speed": args.speed, "trim_silence": args.trim_silence, "cut_prompt": args.cut_prompt}
    [audio] = cast("list[Audio]", dia.generate([text], **script, **editing, progress=bar, sampling_params=params))
    if not audio.duration:
        raise SilentSpeech(_lost(audio.outcome))
    audio.save(output)
    return Made(audio.duration, params.seed, outcome=audio.outcome)


def _lost(outcome: "Outcome | None") -> str:
    """Say which segments stayed silent."""
    from dia_fast.generation.outcome import silence

    assert outcome is not None
    if outcome.status == "failed":
        return silence(max(len(segment.seeds) for segment in outcome.segments))
    silent = ", ".join(str(index + 1) for index in outcome.silent)
    return f"partial: of {len(outcome.segments)} segments the model said nothing in {silent}: try another seed or text"


def _speak_piecewise(
    dia: "Dia", args: argparse.Namespace, params: SamplingParams, text: str, output: Path, bar: "StepBar"
) -> Made:
    from dia_fast.audio.audio import growing_file

    start, seconds, first = time.perf_counter(), 0.0, None
    rate = dia.codec.sample_rate
    if output == STANDARD_OUTPUT and not args.quiet:
        print(f"dia-fast: {rate} Hz, 16 bits, mono, {args.format or 'raw'}", file=sys.stderr)
    options = {} if args.chunk_seconds is None else {"chunk_seconds": args.chunk_seconds}
    chunks = dia.stream(text, **script_options(args), progress=bar, **options, sampling_params=params)
    sink = (
        samples_to_stdout(wav_header(rate) if args.format == "wav" else b"")
        if output == STANDARD_OUTPUT
        else growing_file(output, rate)
    )
    with sink as write, contextlib.closing(chunks):
        for chunk in chunks:
            write(chunk.samples)
            seconds += chunk.duration
            first = first or time.perf_counter() - start
        if not seconds:
            raise SilentSpeech(_lost(chunks.outcome))
    return Made(seconds, params.seed, first, chunks.outcome)


@contextlib.contextmanager
def samples_to_stdout(header: bytes = b"") -> Iterator[Callable[["Samples"], None]]:
    """Yield what writes samples to standard output as 16-bit little-endian integers, at once.

    header: goes before the first.
    """
    from dia_fast.audio.audio import pcm16

    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as raw:

        def write(samples: "Samples") -> None:
            nonlocal header
            left, header = memoryview(header + bytes(pcm16(samples))), b""
            try:
                while left:
                    left = left[raw.write(left) :]
            except BrokenPipeError:
                raise
            except OSError as error:
                raise InputError(f"cannot write to standard output: {error.strerror or error}") from error

        yield write


def wav_header(sample_rate: int) -> bytes:
    """The head of a 16-bit mono WAV whose length is not known, which players read to the end of the stream."""
    unknown = 0xFFFFFFFF
    body = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return b"".join(
        [b"RIFF", struct.pack("<I", unknown), b"WAVEfmt ", struct.pack("<I", len(body)), body, b"data"]
        + [struct.pack("<I", unknown)]
    )


def summary(made: Made, bar: "StepBar", output: Path, sample_rate: int) -> str:
    """One line: what was made, how fast, and how to make it again."""
    rate = bar.steps / bar.seconds
    first = "" if made.first is None else f"first sound after {made.first:.2f} s, "
    name = "standard output" if output == STANDARD_OUTPUT else output
    return (
        f"{name}: {made.seconds:.2f} s of sound at {sample_rate} Hz, {bar.steps} steps in {bar.seconds:.1f} s "
        f"({rate:.1f} steps/s, {made.seconds / bar.seconds:.2f}x realtime), {first}seed {made.seed}"
    )
