"""Voices, batches and open sockets, against a server process that takes uploads."""

import base64
import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from dia_fast import Dia
from dia_fast.audio.code_store import CodeStore
from tests.server.serving import TEXT, Server, serving

pytest.importorskip("fastapi", reason="the extra server is not installed")

ANSWER = "[S2] Good morning."


@pytest.fixture(scope="module")
def recording() -> bytes:
    """At least 2 s of sound, which the demo voice goes on after."""
    audio = Dia.from_pretrained("demo").generate(TEXT, seed=3)
    return audio.to_bytes("wav")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recording: bytes) -> Path:
    path: Path = tmp_path_factory.mktemp("voices")
    (path / "anna.wav").write_bytes(recording)
    (path / "anna.txt").write_text(TEXT)
    (path / "anna.json").write_text(json.dumps({"aliases": ["nova"], "seed": 1, "temperature": 1.0}))
    (path / "mute.wav").write_bytes(recording)
    return path


@pytest.fixture(scope="module")
def own(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = str(tmp_path_factory.mktemp("cache"))
    with serving("--voices", str(folder), "--uploads", "--preload", "anna", XDG_CACHE_HOME=cache) as server:
        yield server


def form(**fields: Any) -> tuple[bytes, str]:
    """A multipart body and its Content-Type; values of bytes are files."""
    parts = b""
    for name, value in fields.items():
        file = f'; filename="{name}.wav"' if isinstance(value, bytes) else ""
        parts += f'--cut\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        parts += (value if isinstance(value, bytes) else str(value).encode()) + b"\r\n"
    return parts + b"--cut--\r\n", "multipart/form-data; boundary=cut"


def send(server: Server, **fields: Any) -> Any:
    body, kind = form(**fields)
    return server.call("/v1/audio/voices", body, Content_Type=kind)


def test_a_folder_is_a_list_of_voices(own: Server) -> None:
    found = own.call("/v1/audio/voices").json
    assert found["object"] == "list" and found["data"][0]["id"] == "anna"
    assert {"id", "object", "name", "created_at", "type"} == set(found["data"][0])
    assert [item["id"] for item in found["data"]] == [item["id"] for item in found["voices"]]
    assert {"alloy", "dialogue", "S1"} <= {item["name"] for item in found["voices"]}
    assert any("mute.wav cannot be used" in line and "mute.txt" in line for line in own.log)
    assert own.call("/v1/audio/voices/anna").json["type"] == "recording"
    assert own.call("/v1/audio/voices/nobody").error["code"] == "voice_not_found"


def test_a_voice_speaks_as_its_recording_sent_along(own: Server, recording: bytes) -> None:
    named = own.call("/v1/audio/speech", {"input": ANSWER, "voice": "anna", "response_format": "wav"})
    assert named.headers["x-seed"] == "1"
    alias = own.call("/v1/audio/speech", {"input": ANSWER, "voice": "nova", "response_format": "wav"})
    url = "data:audio/wav;base64," + base64.b64encode(recording).decode()
    along = own.speak(ANSWER, ref_audio=url, ref_text=TEXT, seed=1, temperature=1)
    assert named.status == 200 and named.body == alias.body == along.body


def test_a_voice_comes_speaks_and_goes(own: Server, folder: Path) -> None:
    sound = io.BytesIO()
    noise = Dia.from_pretrained("demo").generate("[S1] Good morning. [S2] Good evening. [S1] Hello.", seed=1).samples
    soundfile.write(sound, [*noise, *noise], 16_000, format="FLAC")
    made = send(own, audio_sample=sound.getvalue(), name="new-1", ref_text="[S1] Good morning.", consent="yes", seed=4)
    assert made.status == 200 and made.json["id"] == "new-1", made.body
    assert {"new-1.wav", "new-1.txt", "new-1.json"} <= {path.name for path in folder.iterdir()}
    taken = send(own, audio_sample=sound.getvalue(), name="new-1", ref_text="[S1] Hello.")
    assert (taken.status, taken.error["code"]) == (409, "voice_exists")
    spoken = own.call("/v1/audio/speech", {"input": "[S1] Red.", "voice": "new-1", "max_new_tokens": 40})
    assert spoken.headers.get("x-seed") == "4" or spoken.error["code"] == "silent_speech"
    gone = own.call("/v1/audio/voices/new-1", method="DELETE")
    assert gone.json == {"id": "new-1", "object": "audio.voice.deleted", "deleted": True}
    assert not list(folder.glob("new-1*"))
    assert own.call("/v1/audio/voices/new-1", method="DELETE").status == 404
    assert own.call("/v1/audio/voices/alloy", method="DELETE").error["type"] == "permission_error"


def test_uploads_that_cannot_be_used(own: Server, recording: bytes, folder: Path) -> None:
    before = sorted(folder.iterdir())
    whole = {"audio_sample": recording, "name": "bad", "ref_text": TEXT}
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"name": "../bad"}, 400, "name"),
        ({"name": "a" * 65}, 400, "name"),
        ({"audio_sample": b"no sound" * 99}, 415, "audio_sample"),
        ({"audio_sample": recording[:20_000]}, 400, "audio_sample"),
        ({"ref_text": " "}, 400, "input"),
        ({"seed": -3}, 400, "seed"),
    ]
    for change, status, param in cases:
        answer = send(own, **{**whole, **change})
        assert (answer.status, answer.error["param"]) == (status, param), answer.body
    missing = send(own, name="bad", ref_text=TEXT)
    assert (missing.status, missing.error["param"]) == (400, "audio_sample")
    broken = own.call("/v1/audio/voices", b"--cut\r\nnothing", Content_Type="multipart/form-data; boundary=cut")
    assert broken.status == 400 and broken.error["message"]
    assert sorted(folder.iterdir()) == before


def test_a_fixed_server_takes_no_uploads(server: Server, recording: bytes) -> None:
    refused = send(server, audio_sample=recording, name="bad", ref_text=TEXT)
    assert refused.status == 403 and refused.error["code"] == "uploads_off"
    assert server.call("/v1/audio/voices/alloy", method="DELETE").status == 403


def test_a_signal_makes_the_folder_be_read_again(own: Server, folder: Path, recording: bytes) -> None:
    import time

    (folder / "later.wav").write_bytes(recording)
    (folder / "later.txt").write_text(TEXT)
    own.process.send_signal(signal.SIGHUP)
    start = time.monotonic()
    while own.call("/v1/audio/voices/later").status != 200:
        assert time.monotonic() - start < 20
        time.sleep(0.05)


def test_a_batch_gives_each_item_its_own_end(server: Server) -> None:
    items = [{"input": TEXT}, {"input": " "}, {"input": TEXT, "response_format": "pcm"}, {"input": "x", "voice": "?"}]
    answer = server.call("/v1/audio/speech/batch", {"items": items, "seed": 3, "response_format": "wav"})
    found = answer.json
    assert (found["total"], found["succeeded"], found["failed"]) == (4, 2, 2)
    assert [item["status"] for item in found["results"]] == ["success", "error", "success", "error"]
    assert [item["index"] for item in found["results"]] == [0, 1, 2, 3]
    for index, kind in ((0, "wav"), (2, "pcm")):
        assert base64.b64decode(found["results"][index]["audio_data"]) == server.spoken(response_format=kind).body
    assert found["results"][1]["error"]["param"] == "input" and found["results"][3]["error"]["param"] == "voice"
    assert server.call("/v1/audio/speech/batch", {"items": []}).error["param"] == "items"
    many = server.call("/v1/audio/speech/batch", {"items": [{"input": TEXT}] * 33})
    assert many.status == 400 and many.error["param"] == "items"


class Talk:
    """The least of a client of the socket."""

    def __init__(self, server: Server) -> None:
        client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
        self.socket = client.connect(f"ws://127.0.0.1:{server.port}/v1/audio/speech/stream", open_timeout=20)

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self, until: str) -> list[Any]:
        found: list[Any] = []
        while not (found and isinstance(found[-1], dict) and found[-1]["type"] == until):
            data = self.socket.recv(timeout=30)
            found.append(json.loads(data) if isinstance(data, str) else data)
        return found


def test_sentences_are_spoken_as_they_come(server: Server) -> None:
    talk = Talk(server)
    talk.say("session.config", response_format="wav", seed=3, continue_voice=False)
    for part in ("[S1] Open the ", "red door. Open the red", " door."):
        talk.say("input.text", text=part)
    talk.say("input.done")
    heard = talk.hear("session.done")
    told = [item for item in heard if isinstance(item, dict)]
    assert [item["type"] for item in told] == ["audio.start", "audio.done"] * 2 + ["session.done"]
    assert [item["sentence_text"] for item in told[::2][:2]] == [TEXT, TEXT] and told[-1]["total_sentences"] == 2
    middle = heard.index(told[2])
    for part in (heard[:middle], heard[middle:]):
        sound = b"".join(item for item in part if isinstance(item, bytes))
        assert sound == server.spoken(response_format="wav").body
    talk.say("input.text", text="Open the red door.")
    talk.say("session.close")
    assert talk.hear("session.done")[-1]["total_sentences"] == 2  # what was not flushed is not spoken


def test_an_utterance_can_be_cancelled_on_an_open_socket(server: Server) -> None:
    talk = Talk(server)
    talk.say("session.config", seed=3, continue_voice=False, first_chunk_seconds=0.05)
    talk.say("input.text", text="[S1] Please open the red door and the white window. Call the office. Hello. ")
    assert talk.hear("audio.start")
    talk.say("input.cancel", utterance_index=0)
    talk.say("input.cancel", utterance_index=2)
    told = [item for item in talk.hear("audio.done") + talk.hear("audio.done") if isinstance(item, dict)]
    ended = {item["utterance_index"]: item["cancelled"] for item in told if item["type"] == "audio.done"}
    assert ended == {0: True, 2: True}
    talk.say("input.cancel")
    talk.say("input.text", text="[S1] Open the red door.")
    talk.say("input.done")
    heard = talk.hear("session.done")
    last = [item for item in heard if isinstance(item, dict) and item["type"] == "audio.done"][-1]
    assert (last["utterance_index"], last["cancelled"]) == (3, False)
    talk.socket.close()
    server.until("running", 0)


def test_a_socket_that_closes_frees_its_slot(server: Server) -> None:
    talk = Talk(server)
    talk.say("session.config", first_chunk_seconds=0.05)
    talk.say("input.text", text=f"[S1] {', '.join(['please open the red door and the white window'] * 6)}. ")
    with server.given_up():
        talk.hear("audio.start")
        talk.socket.close()


def test_wrong_messages_are_told_and_the_socket_stays_open(server: Server) -> None:
    talk = Talk(server)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"type": "nothing"}, "type"),
        ({"type": "input.text"}, "text"),
        ({"type": "input.cancel", "utterance_index": "x"}, "utterance_index"),
        ({"type": "session.config", "speed": 9}, "speed"),
    ]
    for message, param in cases:
        talk.socket.send(json.dumps(message))
        [answer] = talk.hear("error")
        assert answer["error"]["param"] == param
    for raw in ("{", "[]", b"\0"):
        talk.socket.send(raw)
        assert talk.hear("error")[-1]["error"]["type"] == "invalid_request_error"
    talk.say("session.config", voice="nobody")
    talk.say("input.text", text="[S1] Red.")
    talk.say("input.done")
    told = talk.hear("session.done")
    assert [item["type"] for item in told] == ["error", "audio.done", "session.done"]
    assert told[0]["error"]["param"] == "voice"


def test_the_voice_goes_on_from_sentence_to_sentence(server: Server) -> None:
    talk = Talk(server)
    talk.say("session.config", response_format="wav", seed=3, temperature=1)
    talk.say("input.text", text=f"{TEXT} {ANSWER}")
    talk.say("input.done")
    heard = talk.hear("session.done")
    starts = [item for item in heard if isinstance(item, dict) and item["type"] == "audio.start"]
    assert [item["seed"] for item in starts] == [3, 3]
    second = b"".join(item for item in heard[heard.index(starts[1]) :] if isinstance(item, bytes))
    alone = server.speak(ANSWER, temperature=1).body
    assert second != alone


def test_a_recording_that_goes_while_the_folder_is_read_leaves_the_others(
    recording: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several replicas over one folder, another may have deleted it."""
    from dia_fast.server.voices import Voices

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "voices").mkdir()
    for name in ("anna", "bert"):
        (folder / f"{name}.wav").write_bytes(recording)
        (folder / f"{name}.txt").write_text(TEXT)
    read = CodeStore.codes

    def going(store: CodeStore, path: Path, *rest: float) -> Any:
        found = read(store, path, *rest)
        if path.stem == "anna":
            path.unlink()
        return found

    monkeypatch.setattr(CodeStore, "codes", going)
    dia = Dia.from_pretrained("demo")
    voices = Voices(folder)
    voices.open(dia.config, dia.codec)
    assert [voice.name for voice in voices.all() if voice.kind == "recording"] == ["bert"]
