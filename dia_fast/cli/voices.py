"""`dia-fast voices`: the recordings that may be named as the voice to speak in."""

import argparse
from pathlib import Path
from typing import Any

from dia_fast.cli.paths import path

DESCRIPTION = """\
Lists, adds and shows the voices that `--prompt NAME` and `Dia.voice("NAME")` know: recordings with their transcripts
in one folder, which `dia-fast serve --voices FOLDER` takes as well.
"""

EXAMPLES = """\
examples:
  dia-fast voices add me recording.wav --text "[S1] These are my words."
  dia-fast voices list
  dia-fast voices show me
  dia-fast speak "And this is new." --prompt me
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "voices",
        help="list, add and show voices",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("list", "add", "show"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="letters, digits, - and _")
    parser.add_argument("recording", nargs="?", type=path, metavar="RECORDING", help="5 to 10 seconds of clean speech")
    parser.add_argument("--text", help="what is said in it, with speaker tags (default: the .txt file beside it)")
    parser.add_argument("--folder", type=path, help="of the voices (default: dia-fast/voices in the user's data)")
    return parser


def run(args: argparse.Namespace) -> int:
    from dia_fast.errors import InputError
    from dia_fast.generation.voices import add_voice, find_voice, recording_of, saved_voices, voices_folder

    folder = voices_folder() if args.folder is None else Path(args.folder)
    wanted = {"list": 0, "show": 1, "add": 2}[args.action]
    if sum(item is not None for item in (args.name, args.recording)) != wanted:
        raise InputError(f"voices {args.action} takes {('no name', 'a NAME', 'a NAME and a RECORDING')[wanted]}")
    if args.text is not None and args.action != "add":
        raise InputError("--text belongs to voices add")
    if args.action == "add":
        voice = add_voice(args.name, *recording_of(args.recording, args.text), folder)
        print(f"{voice.name}: {voice.path}")
    elif args.action == "list":
        for voice in saved_voices(folder):
            print(f"{voice.name:16} {_seconds(voice.path)}  {(voice.text or 'no transcript')[:70]}")
    else:
        found = find_voice(args.name, folder)
        if found is None:
            raise InputError(f"there is no voice {args.name} in {folder}")
        print(f"{found.path}\n{_seconds(found.path)}\n{found.text or 'no transcript'}")
    return 0


def _seconds(recording: Path) -> str:
    import soundfile

    try:
        return f"{soundfile.info(str(recording)).duration:5.1f} s"
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        return "no sound"
