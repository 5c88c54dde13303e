"""Routes for voices, and for many texts in one request."""

import asyncio
import base64
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import Response

from dia_fast.generation.sampling_params import MAX_SEED
from dia_fast.server.encoders import media_type
from dia_fast.server.errors import ApiError, as_api_error
from dia_fast.server.schemas import (
    BatchAnswer,
    BatchItem,
    BatchRequest,
    BatchResult,
    ErrorObject,
    VoiceDeleted,
    VoiceList,
    VoiceName,
    VoiceObject,
)
from dia_fast.server.sending import first_or_gone
from dia_fast.server.service import Service, require_uploads
from dia_fast.server.voices import ServedVoice


def add_voices(app: FastAPI, service: Service) -> None:
    """Routes below `/v1/audio/voices`."""
    voices = service.voices

    @app.get("/v1/audio/voices", tags=["voices"])
    async def list_voices() -> VoiceList:
        """Names for the field `voice`."""
        shown = voices.all()
        names = [VoiceName(id=voice.name, name=voice.name) for voice in shown]
        return VoiceList(data=[_object(voice) for voice in shown], voices=names)

    @app.get("/v1/audio/voices/{name}", tags=["voices"])
    async def one_voice(name: str) -> VoiceObject:
        """One of them."""
        if name not in {voice.name for voice in voices.all()}:
            raise ApiError(404, f"there is no voice {name!r:.80}", code="voice_not_found")
        return _object(voices.get(name))

    @app.post("/v1/audio/voices", tags=["voices"])
    async def create_voice(
        audio_sample: Annotated[UploadFile, File(description="2 to 35 seconds, best 5 to 10")],
        name: Annotated[str, Form()],
        ref_text: Annotated[str, Form(description="what is said in the recording, with speaker tags")],
        consent: Annotated[str | None, Form(description="kept by nobody; for clients that send it")] = None,
        seed: Annotated[int | None, Form(ge=0, le=MAX_SEED)] = None,
    ) -> VoiceObject:
        """Keep a recording as a voice. Needs `--uploads`."""
        require_uploads(service.options)
        data = await audio_sample.read()
        return _object(await service.in_thread(voices.add, name, data, ref_text, seed))

    @app.delete("/v1/audio/voices/{name}", tags=["voices"])
    async def delete_voice(name: str) -> VoiceDeleted:
        """Forget a recording. Needs `--uploads`."""
        require_uploads(service.options)
        await service.in_thread(voices.delete, name)
        return VoiceDeleted(id=name)


def _object(voice: ServedVoice) -> VoiceObject:
    return VoiceObject(id=voice.name, name=voice.name, created_at=voice.created, type=voice.kind)


def add_batch(app: FastAPI, service: Service) -> None:
    """`/v1/audio/speech/batch`."""

    @app.post("/v1/audio/speech/batch", tags=["speech"], response_model=BatchAnswer)
    async def batch(body: BatchRequest, request: Request) -> Any:
        """Speak up to 32 texts at once; an item that fails does not concern the others."""
        service.check_open()
        service.gate.check_room(len(body.items))
        request.scope["log"].update(items=len(body.items))
        results: list[BatchResult] = []

        async def all_items() -> None:
            work = (_item(service, index, body.merged(item)) for index, item in enumerate(body.items))
            results.extend(await asyncio.gather(*work))

        if await first_or_gone(all_items(), request.receive):
            service.metrics.disconnects.inc()
            request.scope["log"].update(outcome="left", status=499)
            return Response(status_code=499)
        good = sum(result.status == "success" for result in results)
        name = f"speech-batch-{request.scope['request_id']}"
        return BatchAnswer(id=name, results=results, total=len(results), succeeded=good, failed=len(results) - good)


async def _item(service: Service, index: int, item: BatchItem) -> BatchResult:
    speech = None
    try:
        plan = await service.prepared(item, item.input)
        speech = service.start(plan)
        data = b"".join([part async for part in speech])
    except Exception as error:
        told = as_api_error(error).body()["error"]
        return BatchResult(index=index, status="error", error=ErrorObject(**told))
    finally:
        if speech is not None:
            speech.cancel()
    return BatchResult(
        index=index,
        status="success",
        audio_data=base64.b64encode(data).decode(),
        media_type=media_type(plan.form, plan.rate),
        seed=plan.seed,
        finish_reason=plan.script.outcome.finish_reason,
    )
