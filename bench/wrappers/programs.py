"""Drives one program in this process, on one side, and writes the codes of its sounds.

    python -m bench.wrappers.programs NAME CHECKOUT FOLDER --side ours|own|mended

FOLDER: the stand-ins that `bench.wrappers.weights` has made; the codes go to `NAME-SIDE.npz` in it.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch

from bench.wrappers import mends

TEXT = "[S1] Did you hear that? [S2] Hear what?"
FULL = " ".join([TEXT] * 5)  # fills the stand-in's text window: some copies do not mask padding
TRANSCRIPT = "[S1] This is a voice."
STEPS = 60
CLONE_STEPS = 100
VOICE = "voice.wav"
VOICE_FRAMES = 29
Sounds = dict[str, Callable[[], Any]]
Codes = dict[str, list[np.ndarray]]  # of each sound, in the parts that were decoded, [frames, channels]


def decoded(call: Callable[[], Any]) -> list[np.ndarray]:
    """Make a call and return the codes that were decoded for it."""
    folder = Path(os.environ["RECORDED_CODES"])
    before = set(folder.glob("*.npy"))
    assert np.size(call())
    found = [np.load(path) for path in sorted(set(folder.glob("*.npy")) - before)]
    assert found, "nothing was decoded"
    return found


def pinokio(place: Path, folder: Path, side: str) -> Sounds:
    """The Gradio app of the Pinokio script: its callback, as the button calls it."""
    sys.path.insert(0, str(place))
    sys.argv = ["app.py", "--device", "cpu"]
    if side != "ours":  # which takes a GPU for granted
        from dia.model import Dia

        Dia.from_pretrained.__func__.__defaults__ = ("nari-labs/Dia-1.6B", torch.device("cpu"))
    run = runpy.run_path(str(place / "app.py"), run_name="app")["run_inference"]
    settings = (3.0, 0.0, 0.95, 35, 1.0)
    rate, voice = _voice(folder)
    return {
        "generate": lambda: run(TEXT, None, STEPS, *settings)[1],
        "full": lambda: run(FULL, None, STEPS, *settings)[1],
        "clone": lambda: run(f"{TRANSCRIPT} {FULL}", (rate, voice), _first_steps(side), *settings)[1],
    }


def finetuning(place: Path, folder: Path, side: str) -> Sounds:
    """The command line of the fine-tuning fork; its package's other modules must import as well."""
    sys.path.insert(0, str(place))

    def speak(name: str, text: str, *more: str) -> np.ndarray:
        out = folder / f"finetuning-{side}-{name}.wav"
        sys.argv = ["cli.py", text, "--output", str(out), "--temperature", "0", "--device", "cpu", *more]
        runpy.run_path(str(place / "cli.py"), run_name="__main__")
        return soundfile.read(out, dtype="float32")[0]

    import dia.audio
    import dia.layers

    assert dia.layers.DiaModel and dia.audio.build_delay_indices
    steps, voice = ("--max-tokens", str(STEPS)), ("--audio-prompt", str(folder / VOICE))
    return {
        "generate": lambda: speak("generate", TEXT, *steps),
        "full": lambda: speak("full", FULL, *steps),
        "clone": lambda: speak("clone", f"{TRANSCRIPT} {FULL}", "--max-tokens", str(_first_steps(side)), *voice),
    }


def tts_webui(place: Path, folder: Path, side: str) -> Sounds:
    """The extension of TTS-WebUI, which imports an installed `dia`."""
    sys.path.insert(0, str(place))
    tts = importlib.import_module("extension_dia.main").tts

    settings = (3.0, 0.0, 0.95, 45, 1.0)
    return {
        "generate": lambda: tts(TEXT, None, STEPS, *settings)["audio_out"][1],
        "full": lambda: tts(FULL, None, STEPS, *settings)["audio_out"][1],
        "clone": lambda: tts(f"{TRANSCRIPT} {FULL}", _voice(folder), CLONE_STEPS, *settings)["audio_out"][1],
    }


def vox_box(place: Path, folder: Path, side: str) -> Sounds:
    """The back end of vox-box, which reads its settings from the environment when it is imported."""
    sys.path.insert(0, str(place))

    def speak(name: str) -> np.ndarray:
        os.environ |= {"TEMPERATURE": "0", "MAX_TOKENS": str(CLONE_STEPS if name == "clone" else STEPS)}
        if name == "clone":
            os.environ["AUDIO_PROMPT"] = str(folder / VOICE)
            sys.modules.pop("vox_box.backends.tts.dia")
        backend = importlib.import_module("vox_box.backends.tts.dia")
        config = importlib.import_module("vox_box.config.config").Config()
        config.model, config.device = "nari-labs/Dia-1.6B", "cpu"
        text = {"generate": TEXT, "full": FULL}.get(name, f"{TRANSCRIPT} {FULL}")
        return soundfile.read(backend.Dia(config).load().speech(text, reponse_format="wav"))[0]

    return {name: functools.partial(speak, name) for name in ("generate", "full", "clone")}


def comfyui_yuan(place: Path, folder: Path, side: str) -> Sounds:
    """Yuan-ManX's nodes."""
    nodes = _comfy(place).NODE_CLASS_MAPPINGS
    [model] = nodes["LoadDiaModel"]().load("nari-labs/Dia-1.6B", "cpu")
    run, settings = nodes["DiaTTS"]().run, (3.0, 0.0, 0.95, 35, 1.0)
    voice = nodes["LoadDiaAudio"]().load_audio(str(folder / VOICE))
    return {
        "generate": lambda: run(model, TEXT, None, STEPS, *settings)[0][1],
        "full": lambda: run(model, FULL, None, STEPS, *settings)[0][1],
        "clone": lambda: run(model, f"{TRANSCRIPT} {FULL}", voice, _first_steps(side), *settings)[0][1],
    }


def comfyui_billwuhao(place: Path, folder: Path, side: str) -> Sounds:
    """billwuhao's node: always a clone, of two voices, and a batch of as many texts as there are paragraphs."""
    models = folder / "comfy"
    os.environ["STAND_IN_COMFY"] = str(models)
    package = _comfy(place)
    module = sys.modules[f"{package.__name__}.dianode"]
    theirs = module.Dia.from_local
    # It asks for float16, whose rounding decides among the random codes: for equal ones both sides compute in float32.
    module.Dia.from_local = lambda *given, **options: theirs(*given, **options | {"compute_dtype": "float32"})
    node = package.NODE_CLASS_MAPPINGS["DiaTTSRun"]()
    rate, voice = _voice(folder)
    audio = {"waveform": torch.from_numpy(voice)[None, None], "sample_rate": rate}
    settings = (140, 3.0, 0.0, 0.95, 30, False, True, "a_and_b")
    return {
        "clone": lambda: node.run_inference(FULL, TRANSCRIPT, audio, audio, *settings)[0]["waveform"].flatten().numpy(),
        "batch": lambda: (
            node.run_inference(f"{FULL}\n\n[S1] No. {FULL}", TRANSCRIPT, audio, audio, *settings)[0]["waveform"]
            .flatten()
            .numpy()
        ),
    }


def comfyui_diatest(place: Path, folder: Path, side: str) -> Sounds:
    """BobRandomNumber's nodes. They want a GPU and embed the sizes of the real model: both are replaced in memory."""
    os.environ["STAND_IN_COMFY"] = str(folder / "comfy")
    package = _comfy(place)
    nodes = sys.modules[f"{package.__name__}.nodes"]
    vars(nodes).update(
        get_torch_device=lambda: torch.device("cpu"),
        DEFAULT_DIA_1_6B_CONFIG=json.loads((folder / "comfy" / "TTS" / "Dia-1.6B" / "config.json").read_text()),
    )
    [model] = package.NODE_CLASS_MAPPINGS["DiaLoader"]().load_dia_model("dia.safetensors")
    run, settings = package.NODE_CLASS_MAPPINGS["DiaGenerate"]().generate_audio, (3.0, 0.0, 0.95, 32, 1.0, 2**64 - 1)
    rate, voice = _voice(folder)
    audio = {"waveform": torch.from_numpy(voice)[None, None], "sample_rate": rate}
    return {
        "generate": lambda: run(model, TEXT, STEPS, *settings)[0]["waveform"].flatten().numpy(),
        "full": lambda: run(model, FULL, STEPS, *settings)[0]["waveform"].flatten().numpy(),
        "clone": lambda: (
            run(model, f"{TRANSCRIPT} {FULL}", CLONE_STEPS, *settings, audio)[0]["waveform"].flatten().numpy()
        ),
    }


def dia_tts_server(place: Path, folder: Path, side: str) -> Codes:
    """The server, started as its README says but for the prefix, and asked at every endpoint that it has."""
    import requests

    found: Codes = {}
    with _server(place, folder, side) as (url, home):
        ask = functools.partial(_ask, requests, url)
        ask("GET", "/health", has="model_loaded")
        shutil.copy(folder / VOICE, home / "voices" / "Short.wav")  # theirs are longer than the stand-in can remember
        (home / "voices" / "Short.txt").write_text(TRANSCRIPT)
        voices, references = ask("GET", "/get_predefined_voices").json(), ask("GET", "/get_reference_files").json()
        print(f"{len(voices)} voices, {len(references)} references")
        with (folder / VOICE).open("rb") as file:
            assert VOICE in ask("POST", "/upload_reference", files={"files": (VOICE, file, "audio/wav")}).text
        (home / "reference_audio" / VOICE).with_suffix(".txt").write_text(TRANSCRIPT)
        for path in ("/api/model-info", "/api/model-registry", "/api/model-status"):
            ask("GET", path, has="Dia")
        greedy = {"temperature": 0.1, "cfg_filter_top_k": 1, "speed_factor": 1.0, "output_format": "wav"}
        ask("POST", "/save_settings", json={"generation_defaults": {"temperature": 0.1, "cfg_filter_top_k": 1}})

        def tts(**given: Any) -> list[np.ndarray]:
            settings = greedy | {"max_tokens": STEPS, "split_text": False} | given
            return decoded(lambda: _sound(ask("POST", "/tts", json=settings)))

        def openai(**given: Any) -> list[np.ndarray]:
            return decoded(lambda: _sound(ask("POST", "/v1/audio/speech", json=speech | given)))

        speech = {"input": TEXT, "response_format": "wav"}
        found |= {
            "generate": tts(text=TEXT, voice_mode="dialogue"),
            "full": tts(text=FULL, voice_mode="dialogue"),
            "single": tts(text="Hear?", seed=7),
            "clone": tts(
                text=FULL, voice_mode="clone", clone_reference_filename=VOICE, transcript=TRANSCRIPT,
                max_tokens=CLONE_STEPS,
            ),
            "chunks": tts(text=" ".join([FULL] * 2), voice_mode="dialogue", chunk_size=100, split_text=True),
            "openai": openai(voice="dialogue"),
            "openai voice": openai(voice="Short", seed=2**40),
        }  # fmt: skip
        assert ask("POST", "/v1/audio/speech", json={"input": TEXT, "voice": "S1"}).content[:4] == b"OggS"
        form = {
            "text": TEXT, "voice_mode": "dialogue", "speed_factor": 1.0, "cfg_scale": 3.0, "temperature": 1.0,
            "top_p": 0.95, "cfg_filter_top_k": 30, "seed": -1,
        }  # fmt: skip
        ask("POST", "/web/generate", data=form, has="/outputs/")
        ask("GET", "/", has="<html")
        ask("POST", "/reset_settings", json={})
        ask("POST", "/save_settings", json={"paths": {"model_cache": str(folder / "hub")}})
        ask("POST", "/api/cancel-loading")
        ask("POST", "/api/unload")
        assert requests.post(url + "/tts", json={"text": TEXT}, timeout=60).status_code == 503
        ask("POST", "/restart_server")
        _wait(lambda: requests.get(url + "/health", timeout=9).json()["model_loaded"], "the model after a restart")
        [again], [before] = tts(text=TEXT, voice_mode="dialogue"), found["generate"]
        assert np.array_equal(again, before)
    return found


class Program(NamedTuple):
    """One program, and what its copy of the original does in its own way.

    drive: its function above. quirks: it has the original's off-by-one. dropped: frames at the start that it makes and
    does not decode. mend: see `bench.wrappers.mends`. first_only: it reads the configuration of a model by classes of
    its own, which do not know that of the second generation.
    """

    drive: Callable[[Path, Path, str], Sounds | Codes]
    quirks: bool = True
    dropped: int = 0
    mend: mends.Mend = ()
    first_only: bool = False


PROGRAMS = {
    "dia-tts-server": Program(dia_tts_server, mend=mends.cache_index("dia"), first_only=True),
    "tts-webui": Program(tts_webui),
    "pinokio": Program(pinokio, False, 1, mends.first_release("dia")),
    "dia-finetuning": Program(finetuning, False, 1, (*mends.first_release("dia"), *mends.tags("dia"))),
    "vox-box": Program(vox_box, mend=mends.padding("vox_box/third_party/dia/dia")),
    "comfyui-diatest": Program(comfyui_diatest, mend=mends.cache_index("dia_lib"), first_only=True),
    "comfyui-yuan": Program(comfyui_yuan, False, 1, mends.first_release("src")),
    "comfyui-billwuhao": Program(comfyui_billwuhao),
}


def _first_steps(side: str) -> int:
    """`max_tokens` of a clone; the first release does not count the audio prompt."""
    return CLONE_STEPS + (VOICE_FRAMES if side == "ours" else 0)


def _voice(folder: Path) -> tuple[int, np.ndarray]:
    samples, rate = soundfile.read(folder / VOICE, dtype="float32")
    return rate, samples


def _comfy(place: Path) -> Any:
    """A folder of nodes, imported as ComfyUI's `load_custom_node` does."""
    name = str(place).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _server(place: Path, folder: Path, side: str) -> Iterator[tuple[str, Path]]:
    """Dia-TTS-Server in a copy of its folder, since it writes there; yields its address and the folder."""
    home = folder / f"server-{side}"
    shutil.copytree(place, home, dirs_exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "config.yaml").write_text(
        f"server: {{host: 127.0.0.1, port: {port}}}\npaths: {{model_cache: {folder / 'hub'}}}\n"
    )
    prefix = ["-m", "dia_fast.run", "--quirks"] if side == "ours" else []
    with (folder / f"server-{side}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *prefix, "server.py"], cwd=home, stdout=log, stderr=log)
        try:
            import requests

            url = f"http://127.0.0.1:{port}"

            def up() -> bool:
                told = Path(log.name).read_text()
                assert process.poll() is None, told[-3000:]
                # It serves on without a model.
                assert "Failed to load Dia model" not in told, "the server failed to load the model"
                try:
                    return bool(requests.get(url + "/health", timeout=9).json()["model_loaded"])
                except requests.ConnectionError:
                    return False

            _wait(up, "the server")
            yield url, home
        finally:
            process.terminate()
            process.wait(20)


def _wait(ready: Callable[[], bool], what: str, seconds: float = 120) -> None:
    start = time.monotonic()
    while not ready():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"{what} did not come in {seconds:.0f} s")
        time.sleep(0.5)


def _ask(requests: Any, url: str, method: str, path: str, has: str = "", **content: Any) -> Any:
    answer = requests.request(method, url + path, timeout=300, **content)
    print(method, path, answer.status_code, len(answer.content), "bytes")
    assert answer.status_code < 300 and has in answer.text, (method, path, answer.status_code, answer.text[:500])
    return answer


def _sound(answer: Any) -> np.ndarray:
    import io

    return soundfile.read(io.BytesIO(answer.content), dtype="float32")[0]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", choices=("ours", "own", "mended"), required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    program = PROGRAMS[options.name]
    if options.side == "ours" and options.name != "dia-tts-server":
        from dia_fast.integrations import original

        original.install(quirks=program.quirks)
    codes: Codes = {}
    for name, sound in program.drive(options.checkout.resolve(), options.folder.resolve(), options.side).items():
        try:
            codes[name] = decoded(sound) if callable(sound) else sound
        except (Exception, SystemExit) as error:
            if options.side == "ours":
                raise
            print(f"{name}: {type(error).__name__}: {error}")  # early copies have faults of their own
            codes[name] = []
    named: dict[str, Any] = {
        f"{name}:{index}": part for name, parts in codes.items() for index, part in enumerate(parts)
    }
    np.savez(options.folder / f"{options.name}-{options.side}.npz", **named)


if __name__ == "__main__":
    main()
