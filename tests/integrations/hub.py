"""A cache of the Hugging Face Hub that holds tiny stand-ins under the official names, for programs that name those."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from tests.helpers.front import TINY, make_codec

ROOT = Path(__file__).resolve().parent.parent.parent
DIA, CODEC = "nari-labs/Dia-1.6B-0626", "descript/dac_44khz"
CONFIG = replace(TINY, decoder=replace(TINY.decoder, max_position_embeddings=400))


def make_model(folder: Path, config: DiaConfig = CONFIG, eos_gain: float = 3.0) -> Path:
    """A checkpoint whose speech ends after some dozen rows."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, shape in fused_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif "embedding" not in name:
            values *= shape[1] ** -0.5
        weights[name] = values
    weights["decoder.head"][config.decoder.eos_token_id] *= eos_gain
    return save_pretrained(folder, config, weights)


def make_hub(folder: Path) -> Path:
    """The cache, below a folder: weights of both, and what `AutoProcessor` reads."""
    from examples.tiny import save_processor

    save_processor(make_model(folder / "model"), make_codec(folder / "codec"), name=CODEC)
    for repository, made in ((DIA, folder / "model"), (CODEC, folder / "codec")):
        place = folder / f"models--{repository.replace('/', '--')}"
        shutil.copytree(made, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    return folder


def run(code: list[str], cache: Path, folder: Path, seconds: float = 200) -> subprocess.CompletedProcess[str]:
    """Run Python offline, with that cache, in a folder. Asserts success."""
    environment = os.environ | {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *code], env=environment, cwd=folder, timeout=seconds, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done
