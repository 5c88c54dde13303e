"""Clients that people use, against a server process."""

import io
from typing import Any

import pytest
import soundfile

from tests.server.serving import TEXT, Server

pytest.importorskip("fastapi", reason="the extra server is not installed")
openai: Any = pytest.importorskip("openai", reason="the client of OpenAI is not installed")


@pytest.fixture
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_speech_of_every_format(server: Server, client: Any) -> None:
    for form in ("mp3", "flac"):
        made = client.audio.speech.create(
            model="tts-1", voice="alloy", input=TEXT, response_format=form, extra_body={"seed": 3}
        )
        assert made.content == server.spoken(response_format=form).body
        assert soundfile.info(io.BytesIO(made.content)).channels == 1


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
