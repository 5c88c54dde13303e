"""The original package's programs, before and after `install`.

    python -m examples.with_original simple|batch|clone [--before] [--tiny] [--out FOLDER]

The programs are written for `nari-labs/dia`. With --before that package has to be installed, and runs them; otherwise
`install` makes its name stand for dia-fast. With --tiny a random checkpoint is made on the spot and nothing is
downloaded. The original package has no training; examples/with_transformers.py has.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from dia_fast.integrations import original
from examples import tiny

TEXT = "[S1] Dia is an open weights text to dialogue model. [S2] You get full control over scripts and voices."
VOICE_SAYS = "[S1] This is how I sound. [S2] And this is me."
SETTINGS = {"cfg_scale": 3.0, "temperature": 1.8, "top_p": 0.90, "cfg_filter_top_k": 50, "use_torch_compile": False}


def main() -> None:
    """Run one of the programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=("simple", "batch", "clone"))
    parser.add_argument("--before", action="store_true", help="with the original package itself")
    parser.add_argument("--tiny", action="store_true", help="with a random checkpoint instead of the official one")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for everything (%(default)s)")
    parser.add_argument("--voice", type=Path, help="a recording, for clone")
    options = parser.parse_args()
    if not options.before:
        original.install()
    from dia.model import Dia

    name, voice, limit = "nari-labs/Dia-1.6B-0626", options.voice, 3072
    more: dict[str, Any] = {}
    if options.tiny:
        folder, codec, made = tiny.make(options.out)
        # The original finds its codec by itself; ours may be told where one is.
        name, voice, limit, more = str(folder), voice or made, 200, {"dac_model": codec}
    elif voice is None and options.program == "clone":
        parser.error("--voice is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    model = Dia.from_pretrained(name, compute_dtype="float32", **more)
    if options.program == "simple":
        model.save_audio(str(options.out / "simple.wav"), model.generate(TEXT, max_tokens=limit, **SETTINGS))
    elif options.program == "batch":
        for index, output in enumerate(model.generate([TEXT] * 3, max_tokens=limit, **SETTINGS)):
            model.save_audio(str(options.out / f"simple_{index}.wav"), output)
    else:
        output = model.generate(f"{VOICE_SAYS} {TEXT}", max_tokens=limit, audio_prompt=str(voice), **SETTINGS)
        model.save_audio(str(options.out / "voice_clone.wav"), output)
    print(f"{options.program}: spoken to {options.out}")


if __name__ == "__main__":
    main()
