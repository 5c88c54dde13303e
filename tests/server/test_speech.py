"""`POST /v1/audio/speech` of a real server process: formats, streams, errors, seeds."""

import base64
import io
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dia_fast import Dia, TextWarning
from dia_fast.audio.audio import pcm16
from tests.server.serving import LONG, TEXT, Server

pytest.importorskip("fastapi", reason="the extra server is not installed")
FORMATS = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm;rate=24000;channels=1",
}


@pytest.fixture(scope="module")
def dia() -> Dia:
    return Dia.from_pretrained("demo")


def decoded(data: bytes, form: str, seconds: float) -> tuple[np.ndarray, int]:
    if form == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768, 24_000
    if form == "flac":  # the header tells no length, which players take and soundfile does not: it is put in here
        head = bytearray(data)
        assert head[:4] == b"fLaC" and head[22:26] == bytes(4) and not head[21] & 15
        count = round(seconds * (int.from_bytes(head[18:21], "big") >> 4))
        head[22:26] = count.to_bytes(4, "big")
        data = bytes(head)
    if form == "aac":
        av = pytest.importorskip("av", reason="PyAV (the extra media) is not installed")
        with av.open(io.BytesIO(data), format="aac") as file:
            frames = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
            return np.concatenate(frames), file.streams.audio[0].rate
    return soundfile.read(io.BytesIO(data), dtype="float32")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_holds_the_speech(server: Server, dia: Dia, form: str) -> None:
    if form == "aac":
        pytest.importorskip("av", reason="PyAV (the extra media) is not installed")
    expected = dia.generate(TEXT, seed=3)
    answer = server.spoken(response_format=form)
    assert answer.status == 200 and answer.headers["content-type"] == FORMATS[form]
    assert answer.headers["x-seed"] == "3" and answer.headers["cache-control"] == "no-store"
    samples, rate = decoded(answer.body, form, expected.duration)
    assert int(answer.headers["x-sample-rate"]) == rate
    # Encoders put silence before and after; resampling keeps the length.
    assert 0 <= len(samples) / rate - expected.duration < (0.0001 if form in ("wav", "pcm", "flac") else 0.15)
    loud = expected.resampled(rate).samples
    assert np.std(samples) == pytest.approx(np.std(loud) * (len(loud) / len(samples)) ** 0.5, rel=0.05)


def test_the_samples_are_those_of_generate(server: Server, dia: Dia) -> None:
    expected = dia.generate(TEXT, seed=3)
    native = np.frombuffer(server.spoken(response_format="wav").body[44:], "<i2")
    at_24 = np.frombuffer(server.spoken(response_format="pcm").body, "<i2")
    # Chunks and the whole are decoded to nearly the same floats, which may round to neighbours.
    for samples, audio in ((native, expected), (at_24, expected.resampled(24_000))):
        assert np.abs(samples - np.frombuffer(pcm16(audio.samples), "<i2").astype(int)).max() <= 1


def test_a_long_text_streams_as_generate_speaks_it(server: Server, dia: Dia) -> None:
    with pytest.warns(TextWarning):
        expected = dia.generate(LONG, seed=2, split="auto", temperature=1.0)
    assert expected.outcome is not None and len(expected.outcome.segments) > 1
    answer = server.speak(LONG, seed=2, temperature=1, stream_format="sse", timestamps="segment")
    events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    samples = np.frombuffer(sound[44:], "<i2")
    assert np.abs(samples / 32768 - expected.samples).max() <= 1.5 / 32768
    segments = events[-1]["segments"]
    assert [item["text"] for item in segments] == [item.text for item in expected.outcome.segments]
    assert segments[-1]["end"] == pytest.approx(expected.duration, abs=1e-3)
    assert all(before["end"] == after["start"] for before, after in zip(segments, segments[1:], strict=False))


def test_events_are_those_that_clients_read(server: Server) -> None:
    answer = server.speak(stream=True, response_format="pcm")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.body.decode().strip().split("\n\n")]
    events = [json.loads(block[1].removeprefix("data: ")) for block in blocks]
    assert all(block[0] == f"event: {event['type']}" for block, event in zip(blocks, events, strict=True))
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    usage = events[-1]["usage"]
    assert events[-1]["type"] == "speech.audio.done"
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert b"".join(base64.b64decode(e["audio"]) for e in events[:-1]) == server.spoken(response_format="pcm").body


def test_bytes_do_not_depend_on_what_else_is_spoken(server: Server) -> None:
    forms = ["mp3", "opus", "flac", "wav", "pcm"]
    alone = [server.spoken(response_format=form).body for form in forms]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(server.speak, response_format=form) for form in forms]
        jobs += [pool.submit(server.speak, seed=index) for index in range(3)]
        together = [job.result().body for job in jobs]
    for one, other, form in zip(alone, together, forms, strict=False):
        if form == "opus":  # the serial number of an Ogg stream is drawn; it must not mix two streams
            one, other = (b"".join(_ogg_payloads(data)) for data in (one, other))
        assert one == other, form


def _ogg_payloads(data: bytes) -> list[bytes]:
    found = []
    while data:
        assert data[:4] == b"OggS"
        sizes = data[27 : 27 + data[26]]
        start = 27 + data[26]
        found.append(data[start : start + sum(sizes)])
        data = data[start + sum(sizes) :]
    return found


def test_sound_comes_before_its_end(server: Server) -> None:
    command = ["curl", "-sN", f"{server.url}/v1/audio/speech", "-H", "Content-Type: application/json", "-d"]
    command += [json.dumps({"input": LONG, "seed": 5, "response_format": "pcm"})]
    command += ["-o", "-", "-w", "%{stderr}%{time_starttransfer} %{time_total}"]
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    seconds = [float(part) for part in done.stderr.decode().split()]
    assert len(done.stdout) > 24_000 * 2 * 2
    assert seconds[0] < seconds[1] / 3


def test_a_voice_of_openai_has_a_seed_of_its_own(server: Server) -> None:
    alloy = server.call("/v1/audio/speech", {"input": TEXT, "voice": "alloy", "response_format": "wav"})
    echo = server.call("/v1/audio/speech", {"input": TEXT, "voice": {"id": "echo"}, "response_format": "wav"})
    again = server.call("/v1/audio/speech", {"input": TEXT, "voice": "alloy", "response_format": "wav"})
    assert alloy.headers["x-seed"] != echo.headers["x-seed"] and alloy.body == again.body != echo.body
    drawn = [server.call("/v1/audio/speech", {"input": TEXT}).headers["x-seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_a_text_without_tags_is_the_first_speakers(server: Server) -> None:
    plain = server.spoken(response_format="wav").body
    assert server.speak("Open the red door.").body == plain
    assert server.speak("Open the red door.", voice="S2").body != plain


def test_speed_keeps_codes_and_changes_length(server: Server) -> None:
    pytest.importorskip("av", reason="PyAV (the extra media) is not installed")
    plain = len(server.spoken(response_format="wav").body)
    for speed in (0.25, 4.0):
        assert len(server.speak(speed=speed).body) * speed == pytest.approx(plain, rel=0.06)


def test_a_recording_can_come_along(server: Server, dia: Dia, tmp_path: Path) -> None:
    recording = dia.generate(TEXT, seed=3)
    data = recording.to_bytes("wav")
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    fields = {"ref_audio": url, "ref_text": TEXT, "seed": 1, "temperature": 1}
    answer = server.speak("[S2] Good morning.", **fields)
    path = tmp_path / "voice.wav"
    path.write_bytes(data)
    expected = dia.generate("[S2] Good morning.", audio_prompt=path, prompt_text=TEXT, seed=1, temperature=1.0)
    samples = np.frombuffer(answer.body[44:], "<i2")
    assert np.abs(samples - np.frombuffer(pcm16(expected.samples), "<i2").astype(int)).max() <= 1


def test_remarks_are_told_in_a_header(server: Server) -> None:
    answer = server.speak("[S1] Please open the wardrobe.", instructions="be kind", mood="fine")
    told = answer.headers["x-dia-fast-warnings"]
    assert "wardrobe" in told and "instructions" in told and "mood" in told


BAD = {
    "no text": ({}, 400, "input"),
    "empty text": ({"input": " "}, 400, "input"),
    "only tags": ({"input": "[S1] [S2]"}, 400, "input"),
    "a NUL": ({"input": "a\0b"}, 400, "input"),
    "a lone surrogate": ({"input": "a\ud800b"}, 400, "input"),
    "too long": ({"input": "word " * 14_000}, 400, "input"),
    "text of a wrong type": ({"input": [1]}, 400, "input"),
    "unknown model": ({"input": TEXT, "model": "gpt-9"}, 404, "model"),
    "unknown voice": ({"input": TEXT, "voice": "nobody"}, 400, "voice"),
    "unknown format": ({"input": TEXT, "response_format": "midi"}, 400, "response_format"),
    "rate that does not exist": ({"input": TEXT, "response_format": "opus", "sample_rate": 44_100}, 400, "sample_rate"),
    "rate out of range": ({"input": TEXT, "sample_rate": 1}, 400, "sample_rate"),
    "too fast": ({"input": TEXT, "speed": 5}, 400, "speed"),
    "negative temperature": ({"input": TEXT, "temperature": -1}, 400, "temperature"),
    "huge seed": ({"input": TEXT, "seed": 2**64}, 400, "seed"),
    "too few steps": ({"input": TEXT, "max_new_tokens": 1}, 400, "max_new_tokens"),
    "a URL to fetch": ({"input": TEXT, "ref_audio": "http://127.0.0.1/a.wav", "ref_text": "x"}, 400, "ref_audio"),
    "a file": ({"input": TEXT, "ref_audio": "file:///etc/passwd", "ref_text": "x"}, 400, "ref_audio"),
    "no audio": ({"input": TEXT, "ref_audio": "data:audio/wav;base64,AAAA", "ref_text": "x"}, 415, "ref_audio"),
    "no base64": ({"input": TEXT, "ref_audio": "data:audio/wav;base64,!!", "ref_text": "x"}, 400, "ref_audio"),
    "recording without text": ({"input": TEXT, "ref_audio": "data:audio/wav;base64,AAAA"}, 400, "ref_text"),
    "text without recording": ({"input": TEXT, "ref_text": "x"}, 400, "ref_text"),
    "times of words": ({"input": TEXT, "timestamps": "word"}, 400, "timestamps"),
    "times without events": ({"input": TEXT, "timestamps": "segment"}, 400, "timestamps"),
    "no object": ([1, 2], 400, None),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_told_as_openai_tells_it(server: Server, name: str) -> None:
    body, status, param = BAD[name]
    answer = server.call("/v1/audio/speech", body)
    assert answer.status == status, answer.body
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert (answer.error["type"], answer.error["param"]) == (kind, param), answer.error


def test_other_errors_have_the_same_form(server: Server) -> None:
    assert server.call("/v1/nothing").error["type"] == "not_found_error"
    assert server.call("/v1/audio/speech").status == 405
    assert server.call("/v1/audio/speech").error["message"] == "GET is not allowed for /v1/audio/speech"
    broken = server.call("/v1/audio/speech", b"{", Content_Type="application/json")
    assert (broken.status, broken.error["code"]) == (400, "invalid_json")
    assert server.call("/v1/audio/speech", b"input=x", Content_Type="text/plain").status == 400
    assert server.call("/v1/models/gpt-9").error["code"] == "model_not_found"


def test_models_health_and_description(server: Server) -> None:
    names = {item["id"] for item in server.call("/v1/models").json["data"]}
    assert {"demo", "tts-1", "tts-1-hd", "gpt-4o-mini-tts"} == names
    found = server.call("/v1/models").json
    assert server.call("/v1/audio/models").json == {**found, "models": found["data"]}
    assert server.call("/v1/models/tts-1").json["object"] == "model"
    assert server.call("/health").json == {"status": "ok"} and server.call("/ready").json == {"status": "ready"}
    schema = server.call("/openapi.json").json
    answers = schema["paths"]["/v1/audio/speech"]["post"]["responses"]
    assert {"200", "400", "429", "503"} <= set(answers) and "422" not in answers


def test_requests_have_an_id_and_metrics_count_them(server: Server) -> None:
    assert server.call("/health", X_Request_Id="mine-1").headers["x-request-id"] == "mine-1"
    assert server.call("/health", X_Request_Id="not mine\t").headers["x-request-id"] != "not mine\t"
    seconds = (len(server.spoken(response_format="wav").body) - 44) / 32_000
    before = server.metric("audio_seconds_total")
    done = server.metric('sequences_total{reason="done"}')
    server.speak()
    assert server.metric('sequences_total{reason="done"}') == done + 1
    # Who left before the first frame has started all the same.
    assert server.metric("start_seconds_count") >= server.metric("first_frame_seconds_count") >= done + 1
    assert server.metric("audio_seconds_total") - before == pytest.approx(seconds, abs=0.001)
    assert server.metric("running") == server.metric("waiting") == server.metric("pages") == 0
    assert server.metric("first_byte_seconds_count") > 0 and server.metric("step_seconds_count") > 0


def test_a_text_is_judged_before_it_is_spoken(server: Server) -> None:
    report = server.call("/v1/audio/text", {"input": "[S2] Please open the wardrobe."}).json
    assert report["seconds"] > 1 and report["error"] is None
    assert any("begin with [S1]" in line for line in report["warnings"])
    assert any("wardrobe" in line for line in report["warnings"])
    assert "empty" in server.call("/v1/audio/text", {"input": ""}).json["error"]
