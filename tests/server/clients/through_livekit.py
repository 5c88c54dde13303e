"""Speaks through the TTS plugin of LiveKit's agents, with events and without."""

import asyncio
import base64
import json
import sys
from typing import Any

from livekit.agents import utils
from livekit.plugins import openai


async def spoken(url: str, text: str, voice: str, model: str) -> dict[str, Any]:
    async with utils.http_context.open():
        tts = openai.TTS(base_url=f"{url}/v1", api_key="none", model=model, voice=voice, response_format="pcm")
        frame = await tts.synthesize(text).collect()
        await tts.aclose()
    return {"rate": frame.sample_rate, "audio": base64.b64encode(bytes(frame.data)).decode()}


print(json.dumps([asyncio.run(spoken(*sys.argv[1:4], model)) for model in ("tts-1", "gpt-4o-mini-tts")]))
