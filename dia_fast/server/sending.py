"""The response that sends sound while it is made, and notices when nobody listens any more."""

import asyncio
import base64
import json
import time
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from dia_fast.errors import SilentSpeech
from dia_fast.server.encoders import media_type
from dia_fast.server.errors import ApiError, as_api_error
from dia_fast.server.guard import until_gone
from dia_fast.server.schemas import SpeechRequest
from dia_fast.server.service import Service
from dia_fast.server.speech import Speech
from dia_fast.server.voices import ServedVoice

HEARTBEAT = 10.0  # seconds without a sign before an event stream gets a comment


async def respond(
    service: Service, body: SpeechRequest, request: Request, voice: ServedVoice | None = None
) -> Response:
    """Speak a request: a response once its first bytes are there, or an error. `voice` stands in for its own."""
    service.check_open()
    service.gate.check_room()
    if body.timestamps == "word":
        raise ApiError(400, "timestamps: words are not aligned; use segment, or none", param="timestamps")
    if body.timestamps == "segment" and not body.sse:
        raise ApiError(400, "timestamps: times are sent with stream_format sse only", param="timestamps")
    log = request.scope["log"]
    log.update(format=body.response_format, text_bytes=len(body.input.encode("utf-8", "replace")))
    if service.options.log_text:
        log["text"] = body.input
    plan = await service.prepared(body, body.input, voice)
    log.update(voice=plan.voice, seed=plan.seed)
    service.gate.check_room()
    speech = service.start(plan)
    spoken = Spoken(service, speech, body, log)
    try:
        gone = await first_or_gone(spoken.begin(), request.receive)
    except BaseException as error:
        speech.cancel()
        if isinstance(error, SilentSpeech):
            raise as_api_error(error, seeded=plan.seeded) from error
        raise
    if gone:
        speech.cancel()
        spoken.left()
        return Response(status_code=499)
    return spoken


async def first_or_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Do some work, unless the client leaves before it is done; returns whether it left."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return False
        return True
    finally:
        working.cancel()
        leaving.cancel()


class Spoken(Response):
    """A response that sends sound, or events, while they are made.

    Args:
        service: Whose metrics count it.
        speech: What is sent.
        body: The request.
        log: Fields of the request's line in the log.
    """

    def __init__(self, service: Service, speech: Speech, body: SpeechRequest, log: dict[str, Any]) -> None:
        self.service, self.speech, self.sse, self.log = service, speech, body.sse, log
        self.timestamps = body.timestamps == "segment"
        self._first: bytes | None = None
        self._until = time.monotonic() + service.options.request_timeout
        plan = speech.plan
        headers = {
            "X-Seed": str(plan.seed),
            "X-Sample-Rate": str(plan.rate),
            "X-Accel-Buffering": "no",
            "Cache-Control": "no-store",
        }
        if plan.warnings:
            told = "; ".join(" ".join(line.split()) for line in plan.warnings)
            headers["X-Dia-Fast-Warnings"] = told.encode("ascii", "replace").decode()[:1000]
        kind = "text/event-stream" if self.sse else media_type(plan.form, plan.rate)
        super().__init__(None, 200, headers, kind)
        del self.headers["content-length"]

    async def begin(self) -> None:
        """Wait for the first bytes; an event stream begins after a while without them."""
        try:
            patience = min(HEARTBEAT, self._left()) if self.sse else self._left()
            self._first = await asyncio.wait_for(self._next(), patience)
        except asyncio.TimeoutError:
            if not self.sse or not self._left():
                raise self._late() from None

    def _left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _late(self) -> ApiError:
        seconds = self.service.options.request_timeout
        return ApiError(504, f"no sound within the {seconds:g} s of --request-timeout", code="timeout")

    async def _next(self) -> bytes | None:
        data = await anext(self.speech, None)
        if data is not None and "first_byte" not in self.speech.times:
            now, times, metrics = time.monotonic(), self.speech.times, self.service.metrics
            times["first_byte"] = now
            metrics.first_byte.observe(now - times["begin"])
            metrics.queue.observe(times["running"] - times["begin"])
        return data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                self.left()
        finally:
            sending.cancel()
            leaving.cancel()
            self.speech.cancel()
            self._tell()

    def left(self) -> None:
        """The client has gone."""
        self.service.metrics.disconnects.inc()
        self.log.update(outcome="left", status=499)

    def _tell(self) -> None:
        speech = self.speech
        times = {name: round(at - speech.times["begin"], 4) for name, at in speech.times.items() if name != "begin"}
        self.log.update(times, sound=round(speech.seconds, 3), steps=speech.tokens)
        self.log.setdefault("outcome", speech.plan.script.outcome.finish_reason)

    async def _send(self, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            # A reader that takes nothing for so long is as good as gone.
            await asyncio.wait_for(send(message), max(1.0, self.service.options.request_timeout))

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            data = self._first if self._first is not None else await self._after_comments(put)
            while data is not None:
                await put(_event("speech.audio.delta", audio=base64.b64encode(data).decode()) if self.sse else data)
                data = await self._after_comments(put)
        except Exception as error:
            told = as_api_error(error, seeded=self.speech.plan.seeded)
            self.log.update(outcome="failed", error=str(error)[:200])
            if self.sse:
                await put(_event("speech.audio.error", **told.body()), False)
            return  # without an end, so that nobody takes it for the whole
        await put(_event("speech.audio.done", **self._summary()) if self.sse else b"", False)

    async def _after_comments(self, put: Any) -> bytes | None:
        while self.sse:
            try:
                return await asyncio.wait_for(self._next(), HEARTBEAT)
            except asyncio.TimeoutError:
                if "first_byte" not in self.speech.times and not self._left():
                    raise self._late() from None
                await put(b": waiting\n\n")
        return await self._next()

    def _summary(self) -> dict[str, Any]:
        speech, script = self.speech, self.speech.plan.script
        read = sum(len(segment.encode()) for segment in script.segments)
        summary: dict[str, Any] = {
            "usage": {
                "input_tokens": read,
                "output_tokens": speech.tokens,
                "total_tokens": read + speech.tokens,
            },
            "seed": speech.plan.seed,
            "finish_reason": script.outcome.finish_reason,
            "warnings": list(dict.fromkeys([*speech.plan.warnings, *script.outcome.warnings])),
        }
        if self.timestamps:
            summary["segments"] = [
                {"text": text, "start": round(start, 4), "end": round(end, 4)} for text, start, end in speech.spans
            ]
        return summary


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
