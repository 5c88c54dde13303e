"""Speaks through the OpenAI service of Pipecat, in a pipeline."""

import asyncio
import base64
import json
import sys
from typing import Any

from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.tests.utils import run_test


async def spoken(url: str, text: str, voice: str) -> dict[str, Any]:
    settings = OpenAITTSService.Settings(voice=voice, model="tts-1")
    service = OpenAITTSService(base_url=f"{url}/v1", api_key="none", settings=settings)
    down, up = await run_test(service, frames_to_send=[TTSSpeakFrame(text)], start_timeout=30.0)
    errors = [frame.error for frame in up if isinstance(frame, ErrorFrame)]
    assert not errors, errors
    frames = [frame for frame in down if isinstance(frame, TTSAudioRawFrame)]
    audio = base64.b64encode(b"".join(frame.audio for frame in frames)).decode()
    return {"rate": frames[0].sample_rate, "audio": audio}


print(json.dumps([asyncio.run(spoken(*sys.argv[1:4]))]))
