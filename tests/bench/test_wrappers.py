"""The script that drives other people's programs, on one of our own."""

from pathlib import Path

import numpy as np
import pytest

from bench.wrappers import __main__ as wrappers
from bench.wrappers import mends
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
    own = np.random.default_rng(0).integers(0, 1024, (6, 9))
    other = own.copy()
    other[3, 8] += 1
    assert [wrappers.same_frames(codes, own) for codes in (own, own[:2], other, own + 1)] == [6, 2, 3, 0]
    assert wrappers.same_frames(own, own[1:], dropped=1) == 5
    assert wrappers.counted([own, other], [own, own[:5]], 0) == "9 of 11" and wrappers.counted([own], [], 0) == "fails"


def test_lines_of_a_copy_are_mended_where_they_are_known(tmp_path: Path) -> None:
    checkout = tmp_path / "program"
    (checkout / "dia").mkdir(parents=True)
    (checkout / "dia" / "state.py").write_text("self.current_idx = prefill_len - 1\n")
    folder = mends.mended(checkout, tmp_path / "mended", mends.cache_index("dia"))
    assert (folder / "dia" / "state.py").read_text() == "self.current_idx = prefill_len\n"
    assert (checkout / "dia" / "state.py").read_text().endswith("- 1\n")
    with pytest.raises(ValueError, match=r"current_idx = prefill_len - 1' 0 times"):
        mends.mended(folder, tmp_path / "again", mends.cache_index("dia"))


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
    sounds = wrappers.sounds(folder, "pinokio", "ours")
    assert {name: [part.shape for part in parts] for name, parts in sounds.items()} == {
        "generate": [(44, 9)], "full": [(44, 9)], "clone": [(84, 9)]
    }  # fmt: skip
    told = wrappers.drive("pinokio", program, folder, "own", environment)
    assert told == "ModuleNotFoundError: No module named 'needs_a_gpu'"


@pytest.mark.parametrize(("generation", "status"), [("first", 1), ("second", 0)])
def test_a_program_that_knows_the_first_generation_alone(
    generation: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wrappers, "make", lambda folder, generation: {})
    monkeypatch.setattr(wrappers, "drive", lambda *given: "3 fields are missing")
    assert wrappers.main(["comfyui-diatest=.", "--generation", generation]) == status
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith("3 fields are missing") and ("FAILS" in told) == bool(status)
    assert wrappers.main(["pinokio=.", "--generation", generation]) == 1
