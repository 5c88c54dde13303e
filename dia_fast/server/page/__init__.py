"""The page at `/`: HTML, CSS and JavaScript as they are read by the browser, without a build step or another host.

`app.js` binds the form to the API, `player.js` plays sound while it arrives, `waveform.js` shows it by wavesurfer.js
(8.0.1, its licence beside it), `history.js` keeps what was spoken in the browser, `recording.js` makes WAV from files
and the microphone, `snippets.js` writes requests as programs. The page uses the public API only; `about.json` tells it
what this server has.
"""

import secrets
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles

import dia_fast
from dia_fast.audio.editing import has_media
from dia_fast.checkpoint.demo import vocabulary
from dia_fast.server.encoders import FORMATS
from dia_fast.server.service import Service

FOLDER = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-NONCE'; img-src 'self'; connect-src 'self'; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: its own files and this server, and the styles that wavesurfer.js brings."""

_HEADERS = {
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, service: Service) -> None:
    """`/` and the files below `/page/`."""
    markup = (FOLDER / "index.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = {**_HEADERS, "Content-Security-Policy": POLICY.replace("NONCE", nonce)}
        return Response(markup.replace("NONCE", nonce), media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/page/about.json", include_in_schema=False)
    async def about() -> JSONResponse:
        return JSONResponse(_about(service), headers={"Cache-Control": "no-store"})

    app.mount("/page", _Files(directory=FOLDER))


class _Files(StaticFiles):
    """Files that browsers ask for anew each time, so that none is older than the server; Python is not among them."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response("missing" if path.endswith((".py", ".pyc")) else path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _about(service: Service) -> dict[str, Any]:
    """Collect what the page cannot know: the model, its sampling, and what the operator allows."""
    options, defaults = service.options, service.defaults
    return {
        "version": dia_fast.__version__,
        "model": options.served_name,
        "key_needed": bool(options.keys),
        "uploads": options.uploads,
        "speed": has_media(),
        "formats": [name for name in FORMATS if name != "aac" or has_media()],
        "vocabulary": vocabulary() if service.is_demo else [],
        "defaults": {
            "guidance_scale": defaults.guidance_scale or 1,
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k or 0,
            "speed": 1,
        },
    }
