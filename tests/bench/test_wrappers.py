"""The script that drives other people's programs, on one of our own."""

from pathlib import Path

import numpy as np
import pytest

from bench.wrappers import __main__ as wrappers
from bench.wrappers.weights import make

MODEL = """
import needs_a_gpu

class Dia:
    @classmethod
    def from_pretrained(cls, model_name="nari-labs/Dia-1.6B", device="cuda"): ...

    def _load_dac_model(self): ...

    def generate(self, text, max_tokens=None, cfg_scale=3.0, temperature=1.3, top_p=0.95, use_cfg_filter=True,
                 use_torch_compile=True, cfg_filter_top_k=100, audio_prompt_path=None): ...
"""
APP = """
import gradio as gr
import soundfile
from dia.model import Dia

model = Dia.from_pretrained("nari-labs/Dia-1.6B")

def run_inference(text, audio, steps, scale, temperature, top_p, top_k, speed):
    path = None
    if audio is not None:
        path = "prompt.wav"
        soundfile.write(path, audio[1], audio[0])
    return 44100, model.generate(text, steps, scale, temperature, top_p, audio_prompt_path=path)

with gr.Blocks(theme=gr.themes.Soft()) as demo:
    gr.Button("Speak").click(run_inference)
"""


def test_frames_from_the_start_on() -> None:
    own = np.random.default_rng(0).standard_normal(5 * 512).astype(np.float32)
    other = own.copy()
    other[3 * 512 + 7] += 1
    assert [wrappers.same_frames(sound, own) for sound in (own, own[:1024], other, own + 1)] == [5, 2, 3, 0]


def test_a_program_runs_on_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, folder = tmp_path / "program", tmp_path / "folder"
    (program / "dia").mkdir(parents=True)
    for name, text in {"dia/__init__.py": "", "dia/model.py": MODEL, "app.py": APP}.items():
        (program / name).write_text(text)
    folder.mkdir()
    environment = make(folder, "first")
    root = Path(wrappers.__file__).parents[2]
    environment["PYTHONPATH"] += f":{root}:{root / 'kernels'}"
    assert wrappers.drive("pinokio", program, folder, "ours", environment) is None
    sounds = np.load(folder / "pinokio-ours.npz")
    assert sounds.files == ["generate", "full", "clone"] and all(len(sounds[name]) > 40 * 512 for name in sounds.files)
    told = wrappers.drive("pinokio", program, folder, "own", environment)
    assert told == "ModuleNotFoundError: No module named 'needs_a_gpu'"
