"""Text in, sound out, over a socket that stays open: `WS /v1/audio/speech/stream`.

The client sends `session.config` (the options of speech), `input.text` in pieces of any size, `input.done` to have
the rest spoken, `input.cancel` to silence one utterance or all, and `session.close`. Each sentence is an utterance:
the server sends `audio.start`, binary frames, `audio.done`; after `input.done` it says `session.done` and listens on.
"""

import asyncio
import json
import logging
import re
import uuid
from collections import deque
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from dia_fast.server.errors import ApiError, as_api_error, validation_error
from dia_fast.server.guard import KEY_PROTOCOL
from dia_fast.server.schemas import SpeechRequest
from dia_fast.server.service import Service
from dia_fast.server.speech import Plan, Speech
from dia_fast.server.voices import ServedVoice
from dia_fast.text.segmentation import sentence_ends
from dia_fast.text.tokenizer import ABSURD_BYTES, TAG

logger = logging.getLogger("dia_fast.server.requests")

_TURN = re.compile(rf"\s*({TAG.pattern})")


class Sentences:
    """Cuts a text that comes in pieces at the ends of its sentences and turns, each with the tag of its speaker."""

    def __init__(self) -> None:
        self._rest, self._speaker = "", ""

    def __len__(self) -> int:
        return len(self._rest)

    def take(self, text: str, *, last: bool = False) -> list[str]:
        """The sentences that are complete, now that this has been said.

        Args:
            last: And what is left.
        """
        self._rest += text
        cuts = sentence_ends(self._rest)
        cuts += [found.start() for found in TAG.finditer(self._rest) if self._rest[: found.start()].strip()]
        cuts = sorted({*cuts, *([len(self._rest)] if last else [])})
        found = []
        for start, end in zip([0, *cuts], cuts, strict=False):
            if words := self._rest[start:end].strip():
                found.append(words)
        self._rest = self._rest[cuts[-1] :] if cuts else self._rest
        return [whole for words in found if (whole := self._tagged(words))]

    def _tagged(self, words: str) -> str:
        tags = TAG.findall(words)
        tagged = words if _TURN.match(words) or not self._speaker else f"{self._speaker} {words}"
        self._speaker = tags[-1] if tags else self._speaker
        return tagged if TAG.sub("", words).strip() else ""


class Conversation:
    """One open socket."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self.service, self.socket = service, socket
        self._options: dict[str, Any] = {"response_format": "pcm"}
        self._carry = True
        self._sentences = Sentences()
        self._pending: deque[tuple[int, str]] = deque()
        self._count, self._done_asked, self._closing = 0, False, False
        self._arrived = asyncio.Event()
        self._speaking: tuple[int, Speech | None] | None = None
        self._cancelled: set[int] = set()
        self._before: Plan | None = None
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Talk until one side has had enough."""
        worker = asyncio.ensure_future(self._speak_all())
        try:
            while not self._closing:
                message = await self.socket.receive()
                if message["type"] == "websocket.disconnect":
                    break
                try:
                    await self._hear(message)
                except (ApiError, ValidationError, ValueError) as error:
                    await self._tell("error", **_told(error))
            if self._closing:
                self._arrived.set()
                await worker
                await self.socket.close()
        except (WebSocketDisconnect, RuntimeError):
            self.service.metrics.disconnects.inc()
        finally:
            worker.cancel()
            if self._speaking and self._speaking[1]:
                self._speaking[1].cancel()

    async def _hear(self, message: dict[str, Any]) -> None:
        text = message.get("text")
        if text is None:
            raise ApiError(400, "messages are JSON in text frames", code="invalid_message")
        try:
            found = json.loads(text)
        except ValueError:
            raise ApiError(400, "the message is not JSON", code="invalid_json") from None
        kind = found.get("type") if isinstance(found, dict) else None
        if kind == "session.config":
            self._configure({name: value for name, value in found.items() if name != "type"})
        elif kind == "input.text":
            self._take(found.get("text"))
        elif kind == "input.done":
            self._queue(self._sentences.take("", last=True))
            self._done_asked = True
        elif kind == "input.cancel":
            await self._cancel(found.get("utterance_index"))
        elif kind == "session.close":
            self._closing = True
        else:
            known = "session.config, input.text, input.done, input.cancel, session.close"
            raise ApiError(400, f"type {kind!r:.40} is unknown; there are {known}", param="type")
        self._arrived.set()

    def _configure(self, fields: dict[str, Any]) -> None:
        carry = fields.pop("continue_voice", True)
        if not isinstance(carry, bool):
            raise ApiError(400, "continue_voice must be true or false", param="continue_voice")
        options = {"response_format": "pcm", **fields}
        SpeechRequest(**{**options, "input": "-"})
        self._options, self._carry = options, carry

    def _take(self, text: object) -> None:
        if not isinstance(text, str):
            raise ApiError(400, "text must be a string", param="text")
        waiting = len(self._sentences) + sum(len(sentence) for _, sentence in self._pending)
        if len(text) + waiting > ABSURD_BYTES:
            raise ApiError(413, f"more than {ABSURD_BYTES} bytes wait to be spoken", param="text")
        self._queue(self._sentences.take(text))

    def _queue(self, sentences: list[str]) -> None:
        for sentence in sentences:
            self._pending.append((self._count, sentence))
            self._count += 1

    async def _cancel(self, index: object) -> None:
        if index is not None and not isinstance(index, int):
            raise ApiError(400, "utterance_index must be a number, or left out for all", param="utterance_index")
        gone = [item for item in self._pending if index in (None, item[0])]
        self._pending = deque(item for item in self._pending if item not in gone)
        if index is None:
            self._sentences = Sentences()
        if self._speaking and index in (None, self._speaking[0]):
            self._cancelled.add(self._speaking[0])
            if self._speaking[1]:
                self._speaking[1].cancel()
        for number, _ in gone:
            await self._tell("audio.done", sentence_index=number, utterance_index=number, cancelled=True)

    async def _speak_all(self) -> None:
        while True:
            if self._pending:
                number, sentence = self._pending.popleft()
                await self._speak(number, sentence)
            elif self._done_asked or self._closing:
                self._done_asked = False
                await self._tell("session.done", total_sentences=self._count)
                if self._closing:
                    return
            else:
                self._arrived.clear()
                await self._arrived.wait()

    async def _speak(self, number: int, sentence: str) -> None:
        self._speaking = number, None
        names = {"sentence_index": number, "utterance_index": number}
        speech = None
        try:
            self.service.check_open()
            self.service.gate.check_room()
            body = SpeechRequest(**{**self._options, "input": sentence})
            plan = await self.service.prepared(body, sentence, self._voice(body))
            if number not in self._cancelled:
                speech = self.service.start(plan)
                self._speaking = number, speech
                form = {"format": plan.form.name, "sample_rate": plan.rate, "seed": plan.seed}
                await self._tell("audio.start", **names, sentence_text=sentence, **form)
                async for data in speech:
                    await self._send(data)
                self._before = plan
                reason = plan.script.outcome.finish_reason
                await self._tell("audio.done", **names, cancelled=False, finish_reason=reason)
        except asyncio.CancelledError:
            if number not in self._cancelled:
                raise
        except Exception as error:
            if number not in self._cancelled:
                await self._tell("error", **names, **_told(error))
                await self._tell("audio.done", **names, cancelled=False, finish_reason="error")
        finally:
            self._speaking = None
            if speech is not None:
                speech.cancel()
        if number in self._cancelled:
            await self._tell("audio.done", **names, cancelled=True)

    def _voice(self, body: SpeechRequest) -> ServedVoice | None:
        """The sentence before as a voice, where none with a recording was asked for."""
        if not self._carry or self._before is None or body.ref_audio is not None:
            return None
        script = self._before.script
        frames = script.frames[-1]
        asked = self.service.voices.get(body.voice if isinstance(body.voice, str) else body.voice and body.voice.id)
        if asked.codes is not None or frames is None or not len(frames) or script.truncated[-1]:
            return None
        return ServedVoice(
            asked.name, "recording", codes=frames, text=script.segments[-1], seed=script.seed, speaker=asked.speaker
        )

    async def _tell(self, kind: str, **fields: Any) -> None:
        async with self._sending:
            await self.socket.send_text(json.dumps({"type": kind, **fields}))

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await asyncio.wait_for(self.socket.send_bytes(data), max(1.0, self.service.options.request_timeout))


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, ValidationError):
        places = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        return validation_error(RequestValidationError(places)).body()
    return as_api_error(error).body()


def add_conversation(app: FastAPI, service: Service) -> None:
    """`/v1/audio/speech/stream`."""

    @app.websocket("/v1/audio/speech/stream")
    async def stream(socket: WebSocket) -> None:
        offered = [item.strip() for item in socket.headers.get("sec-websocket-protocol", "").split(",")]
        chosen = next((item for item in offered if item.startswith(KEY_PROTOCOL)), None)
        await socket.accept(chosen, [(b"x-request-id", str(socket.scope.get("request_id", uuid.uuid4())).encode())])
        await Conversation(service, socket).run()
