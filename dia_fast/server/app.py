"""The HTTP interface: its routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

import dia_fast
from dia_fast.server import errors
from dia_fast.server.catalogue import add_batch, add_voices
from dia_fast.server.compat import add_compat
from dia_fast.server.conversation import add_conversation
from dia_fast.server.guard import Guard
from dia_fast.server.page import add_page
from dia_fast.server.schemas import (
    AudioModelList,
    ErrorBody,
    Model,
    ModelList,
    SpeechRequest,
    Status,
    TextReport,
    TextRequest,
)
from dia_fast.server.sending import respond
from dia_fast.server.service import ALIASES, Service

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 413, 415, 429, 500, 503, 504)
}


def create_app(service: Service) -> FastAPI:
    """The application of one service, without the guard that `guarded` puts before it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        yield
        loading.cancel()
        await service.close()

    app = FastAPI(
        title="dia-fast",
        version=dia_fast.__version__,
        summary="Text to dialogue by Dia, in the manner of the OpenAI API",
        lifespan=lifespan,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.service = service
    errors.install(app)
    _operations(app, service)
    _speech(app, service)
    add_voices(app, service)
    add_batch(app, service)
    add_conversation(app, service)
    if service.options.compat:
        add_compat(app, service)
    if service.options.page:
        add_page(app, service)
    _describe(app)
    return app


def guarded(app: FastAPI, service: Service) -> Guard:
    """The application as it is served."""
    options = service.options
    inner: Any = app
    if options.cors_origins:
        inner = CORSMiddleware(
            app,
            allow_origins=options.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Seed", "X-Request-Id", "X-Sample-Rate", "X-Dia-Fast-Warnings"],
        )

    def counted(endpoint: str, form: str, status: int) -> None:
        service.metrics.requests.labels(endpoint, form, str(status)).inc()

    return Guard(inner, options, counted)


def _operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["operations"])
    async def health() -> Status:
        """Answer that the process is alive."""
        return Status(status="ok")

    @app.get("/ready", tags=["operations"], responses={503: {"model": Status}})
    async def ready() -> JSONResponse:
        """Answer if requests are served: 503 while the model is loaded, and from the signal to stop on."""
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def models() -> ModelList:
        names = (service.options.served_name, *ALIASES)
        return ModelList(data=[Model(id=name, created=service.options.started) for name in names])

    @app.get("/v1/models", tags=["models"])
    async def list_models() -> ModelList:
        """The model of this server, and the aliases it answers to."""
        return models()

    @app.get("/v1/audio/models", tags=["models"])
    async def list_audio_models() -> AudioModelList:
        """As `/v1/models`."""
        found = models()
        return AudioModelList(data=found.data, models=found.data)

    @app.get("/v1/models/{name}", tags=["models"])
    async def one_model(name: str) -> Model:
        """One of `/v1/models`."""
        service.check_model(name)
        return Model(id=name, created=service.options.started)


_SOUND = {"schema": {"type": "string", "format": "binary"}}
_SPOKEN = {
    "description": "the sound, sent while it is made; or events",
    "content": {
        **{f"audio/{kind}": _SOUND for kind in ("mpeg", "ogg", "aac", "flac", "wav", "pcm")},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


def _speech(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/speech", tags=["speech"], response_class=Response, responses={200: _SPOKEN})
    async def speech(body: SpeechRequest, request: Request) -> Response:
        """Speak a text. The sound is sent while it is made."""
        return await respond(service, body, request)

    @app.post("/v1/audio/text", tags=["speech"])
    async def text(body: TextRequest) -> TextReport:
        """Tell the expected length of a text in seconds, and what will sound bad in it."""
        return service.report(body.input, body.ref_text)


def _describe(app: FastAPI) -> None:
    """Make the description tell the errors there are: FastAPI's own 422 never leaves this server."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema.get("components", {}).get("schemas", {}).pop(name, None)
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}, {}]
            app.openapi_schema = schema
        return app.openapi_schema

    setattr(app, "openapi", openapi)  # noqa: B010 - as FastAPI documents it; an assignment to a method has no type
