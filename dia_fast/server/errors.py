"""Errors as the OpenAI API writes them: `{"error": {"message", "type", "param", "code"}}` for everything."""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dia_fast.errors import DiaFastError, InputError, OutOfMemory, OutOfPages, SilentSpeech

logger = logging.getLogger("dia_fast.server")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """The error that ends a request: a status and the contents of the error object.

    Args:
        status: HTTP status.
        message: What was wrong, with which value, and what would work.
        param: Name of the field that is at fault.
        code: Short name for programs.
        headers: Additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def overloaded(message: str, code: str, seconds: int, status: int = 503) -> ApiError:
    """An error that another attempt may not meet, with the time to wait."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(seconds)})


# Arguments of the Python interface by the names of the fields.
_FIELDS = {"text": "input", "prompt_text": "ref_text", "audio_prompt": "ref_audio"}
_FIELD = re.compile(r"[a-z_]+(?= |:)")


def as_api_error(error: Exception, *, seeded: bool = False) -> ApiError:
    """Translate any exception.

    Args:
        error: What was raised.
        seeded: Whether the request names its seed, so that another attempt would end alike.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        named = _FIELD.match(str(error))
        name = _FIELDS.get(named[0], named[0]) if named else None
        known = name in _KNOWN
        return ApiError(400, str(error), param=name if known else None)
    if isinstance(error, OutOfPages | OutOfMemory):
        return overloaded(str(error), "out_of_memory", 5)
    if isinstance(error, SilentSpeech):
        again = "false" if seeded else "true"
        return ApiError(500, str(error), code="silent_speech", headers={"x-should-retry": again})
    if isinstance(error, DiaFastError):
        return ApiError(500, str(error))
    return ApiError(500, "the server failed; its log says how", code="internal_error")


_KNOWN = frozenset(
    "input voice ref_audio ref_text seed temperature top_p top_k guidance_scale max_new_tokens split chunk_seconds "
    "first_chunk_seconds sample_rate speed timestamps stream_format response_format".split()
)


def validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, a path or a query."""
    first = error.errors()[0]
    where = [str(part) for part in first.get("loc", ())[1:]]
    if first.get("type") == "json_invalid":
        return ApiError(400, "the body is not JSON: " + str(first.get("ctx", {}).get("error", "")), code="invalid_json")
    name = ".".join(where) or None
    message = first.get("msg", "not valid")
    return ApiError(400, f"{name}: {message}" if name else f"{message}: the body must be a JSON object", param=name)


def install(app: FastAPI) -> None:
    """Make every error of an app leave in this form."""

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return validation_error(error).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = error.status_code
        message = error.detail
        if status == 404 and message == HTTPStatus.NOT_FOUND.phrase:
            message = f"unknown URL: {request.method} {request.url.path}"
        if status == 405:
            message = f"{request.method} is not allowed for {request.url.path}"
        return ApiError(status, str(message), headers=error.headers).response()

    async def known(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        if told.status == 500 and not isinstance(error.__cause__ or error, SilentSpeech):  # the program is not at fault
            logger.error("request %s failed", request.scope.get("request_id"), exc_info=error)
        return told.response()

    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, DiaFastError, Exception):
        app.add_exception_handler(kind, known)
