"""Speaks as Home Assistant does: in the Wyoming protocol, to a proxy that speaks to the server."""

import asyncio
import base64
import json
import socket
import sys
from typing import Any

from wyoming.audio import AudioChunk, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.info import Describe, Info
from wyoming.tts import Synthesize, SynthesizeVoice


async def spoken(port: int, text: str, voice: str) -> dict[str, Any]:
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Describe().event())
        found = await client.read_event()
        assert found is not None
        voices = [item.name for program in Info.from_event(found).tts for item in program.voices]
        assert voice in voices, voices
        await client.write_event(Synthesize(text, voice=SynthesizeVoice(name=voice)).event())
        rate, audio = 0, b""
        while (event := await client.read_event()) is not None and not AudioStop.is_type(event.type):
            assert not Error.is_type(event.type), Error.from_event(event)
            if AudioChunk.is_type(event.type):
                chunk = AudioChunk.from_event(event)
                rate, audio = chunk.rate, audio + chunk.audio
    return {"rate": rate, "audio": base64.b64encode(audio).decode()}


async def through_proxy(url: str, text: str, voice: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--uri", f"tcp://127.0.0.1:{port}", "--tts-openai-url", f"{url}/v1", "--tts-models", "tts-1"]
    command = [sys.executable, "-m", "wyoming_openai", *options, "--tts-voices", voice]
    proxy = await asyncio.create_subprocess_exec(*command, stdout=sys.stderr)
    try:
        for _ in range(300):
            try:
                return await spoken(port, text, voice)
            except ConnectionRefusedError:
                await asyncio.sleep(0.1)
        raise TimeoutError("the proxy does not listen")
    finally:
        proxy.terminate()
        await proxy.wait()


print(json.dumps([asyncio.run(through_proxy(*sys.argv[1:4]))]))
