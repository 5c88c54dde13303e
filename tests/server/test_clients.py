"""Clients that people use, against a server process."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dia_fast import Dia
from tests.server.serving import RECORDED, TEXT, Server, serving

pytest.importorskip("fastapi", reason="the extra server is not installed")
openai: Any = pytest.importorskip("openai", reason="the client of OpenAI is not installed")


@pytest.fixture
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


CODECS = {"mp3": "mp3", "opus": "opus", "aac": "aac", "flac": "flac", "wav": "pcm_s16le", "pcm": "pcm_s16le"}


@pytest.mark.parametrize("form", CODECS)
def test_speech_of_every_format(server: Server, client: Any, tmp_path: Path, form: str) -> None:
    """The client of OpenAI saves it, ffprobe knows it, and ffmpeg plays it to its end without a complaint."""
    if form == "aac":
        pytest.importorskip("av", reason="PyAV (the extra media) is not installed")
    made = client.audio.speech.create(
        model="tts-1", voice="alloy", input=TEXT, response_format=form, extra_body={"seed": 3}
    )
    path = tmp_path / f"speech.{form}"
    made.write_to_file(path)
    if form != "opus":  # the serial number of an Ogg stream is drawn
        assert made.content == server.spoken(response_format=form).body
    if shutil.which("ffprobe") is None or shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed: apt-get install ffmpeg")
    source = ["-f", "s16le", "-ar", "24000", "-i", path] if form == "pcm" else ["-i", path]
    shown = ["-show_entries", "stream=codec_name,sample_rate,channels", "-of", "json"]
    done = subprocess.run(["ffprobe", "-v", "error", *source, *shown], capture_output=True, check=True)
    [stream] = json.loads(done.stdout)["streams"]
    assert stream["codec_name"] == CODECS[form] and stream["channels"] == 1
    played = subprocess.run(["ffmpeg", "-v", "warning", *source, "-f", "s16le", "-"], capture_output=True, check=True)
    harmless = ("Estimating duration", "Guessed Channel Layout", "Ignoring maximum wav data size")
    harmless += ("corrupt",) if form == "wav" else ()  # how ffmpeg calls the last packet of a WAV without a length
    complaints = [line for line in played.stderr.decode().splitlines() if not any(part in line for part in harmless)]
    assert not complaints, complaints
    seconds = len(server.spoken(response_format="pcm").body) / 48_000
    assert 0 <= len(played.stdout) / 2 / int(stream["sample_rate"]) - seconds < 0.15


def test_voices_come_and_go(tmp_path: Path) -> None:
    sound = Dia.from_pretrained("demo").generate(RECORDED, seed=3)
    with serving("--voices", str(tmp_path), "--uploads", XDG_CACHE_HOME=str(tmp_path / "cache")) as own:
        client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0)
        sample = ("door.wav", sound.to_bytes("wav"), "audio/wav")
        made = client.audio.voices.create(
            audio_sample=sample, consent="cons_1", name="door", extra_body={"ref_text": TEXT}
        )
        assert (made.id, made.name) == ("door", "door") and made.created_at > 0
        with pytest.raises(openai.ConflictError):
            client.audio.voices.create(audio_sample=sample, consent="c", name="door", extra_body={"ref_text": TEXT})
        assert client.audio.voices.delete("door").deleted
        with pytest.raises(openai.NotFoundError):
            client.audio.voices.delete("door")


def test_the_requests_of_open_webui(server: Server) -> None:
    """Its lists, which it asks for without its key, and its request for speech, whose MP3 it keeps."""
    models = server.call("/v1/audio/models").json["models"]
    assert {"tts-1", "tts-1-hd"} <= {model["id"] for model in models}
    voices = {voice["id"]: voice["name"] for voice in server.call("/v1/audio/voices").json["voices"]}
    assert voices["alloy"] == "alloy"
    who = {"X_OpenWebUI_User_Name": "Anna%20B", "X_OpenWebUI_User_Role": "user", "Authorization": "Bearer none"}
    asked = {"input": TEXT, "voice": "alloy", "model": "tts-1", "seed": 3}  # seed: of its additional parameters
    spoken = server.call("/v1/audio/speech", asked, **who)
    assert spoken.status == 200 and spoken.headers["content-type"] == "audio/mpeg"
    assert "x-dia-fast-warnings" not in spoken.headers
    assert spoken.body == server.spoken(response_format="mp3").body
    refused = server.call("/v1/audio/speech", {**asked, "voice": "?"}, **who)
    assert refused.status == 400 and refused.error["message"]  # which it shows


def test_the_requests_of_open_webui_at_a_server_with_a_key() -> None:
    """Without its lists it offers the names of OpenAI's voices and models, which every server here has."""
    with serving("--api-key", "sesame") as own:
        assert own.call("/v1/audio/models").status == own.call("/v1/audio/voices").status == 401
        for model in ("tts-1", "tts-1-hd"):
            asked = {"input": TEXT, "voice": "shimmer", "model": model}
            assert own.call("/v1/audio/speech", asked, Authorization="Bearer sesame").status == 200


def test_the_request_of_sillytavern(server: Server) -> None:
    asked = {"input": TEXT, "response_format": "mp3", "voice": "nova", "speed": 1, "model": "tts-1", "seed": 3}
    spoken = server.call("/v1/audio/speech", asked, Authorization="Bearer ")  # as it sends where no key is set
    assert spoken.status == 200 and spoken.headers["content-type"] == "audio/mpeg"
    assert spoken.body == server.spoken(voice="nova", response_format="mp3").body


CLIENTS = Path(os.environ.get("DIA_FAST_CLIENTS", Path(__file__).parents[2] / ".venv-clients"))


@pytest.mark.parametrize("name", ["livekit", "pipecat", "wyoming"])
def test_agents_and_proxies_speak(server: Server, name: str) -> None:
    python = CLIENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} has no environment in {CLIENTS}: make test-clients")
    program = Path(__file__).parent / "clients" / f"through_{name}.py"
    done = subprocess.run([python, program, server.url, TEXT, "alloy"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    form = "wav" if name == "wyoming" else "pcm"
    wanted = server.spoken(voice="alloy", seed=1, response_format=form)  # the seed of that voice
    for spoken in json.loads(done.stdout.splitlines()[-1]):
        audio = base64.b64decode(spoken["audio"])
        assert spoken["rate"] == int(wanted.headers["x-sample-rate"])
        body = wanted.body[44:] if form == "wav" else wanted.body
        # Some pad the last frame.
        assert audio[: len(body)] == body and not any(audio[len(body) :]) and len(audio) - len(body) < 1000


def test_a_stream(server: Server, client: Any) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="alloy", input=TEXT, response_format="pcm", extra_body={"seed": 3}
    ) as answer:
        chunks = list(answer.iter_bytes())
        assert answer.headers["x-seed"] == "3"
    assert len(chunks) > 2 and b"".join(chunks) == server.spoken(response_format="pcm").body


def test_errors_and_models(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.audio.speech.create(model="gpt-9", voice="alloy", input=TEXT)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT, speed=9)
    assert wrong.value.param == "speed" and "4" in str(wrong.value)
    assert "demo" in [model.id for model in client.models.list()]


def test_a_full_queue_is_tried_again(tight: Server) -> None:
    """The client waits as Retry-After says; meanwhile there is room."""
    from tests.server.test_limits import _with_key, ask

    until = _with_key(tight)
    connections = [ask(tight)]
    until("running", 1)
    connections.append(ask(tight))
    until("waiting", 1)
    patient = openai.OpenAI(base_url=f"{tight.url}/v1", api_key="open sesame", max_retries=8)
    connections[1].close()
    connections[0].close()
    made = patient.audio.speech.create(model="demo", voice="alloy", input=TEXT, response_format="wav")
    assert made.content[:4] == b"RIFF"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{tight.url}/v1", api_key="wrong").models.list()
