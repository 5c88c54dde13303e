"""Routes of Dia-TTS-Server, under its names and ranges, so that programs written for it go on working.

Its `/v1/audio/speech`, `/health` and `/docs` are those of this server. Where it does otherwise is in docs/server.md.
"""

import dataclasses
from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from dia_fast.errors import InputError
from dia_fast.generation.sampling_params import MAX_SEED
from dia_fast.server.errors import ApiError
from dia_fast.server.schemas import SpeechRequest
from dia_fast.server.sending import respond
from dia_fast.server.service import Service, require_uploads
from dia_fast.server.voices import ServedVoice, Voices
from dia_fast.text.tokenizer import ABSURD_BYTES

SINGLE = {"dialogue": "dialogue", "single_s1": "S1", "single_s2": "S2"}


class TtsRequest(BaseModel):
    """`POST /tts`."""

    text: str = Field(max_length=ABSURD_BYTES)
    voice_mode: Literal["dialogue", "single_s1", "single_s2", "clone", "predefined"] = "single_s1"
    clone_reference_filename: str | None = Field(None, max_length=256, description="file name of the voice")
    transcript: str | None = Field(None, max_length=ABSURD_BYTES, description="what is said in it, if not what is kept")
    output_format: Literal["opus", "wav", "mp3"] = "opus"
    max_tokens: int | None = Field(None, ge=1)
    cfg_scale: float = Field(3.0, ge=1, le=5)
    temperature: float = Field(1.3, ge=0.1, le=1.5)
    top_p: float = Field(0.95, ge=0.1, le=1)
    speed_factor: float = Field(1.0, ge=0.5, le=2, description="keeps the pitch; needs the extra `media`")
    cfg_filter_top_k: int = Field(35, ge=1, le=100)
    seed: int | None = Field(-1, ge=-1, le=MAX_SEED, description="-1 draws one")
    split_text: bool | None = True
    chunk_size: int | None = Field(None, ge=50, le=1000, description="accepted and ignored: segments have a length")

    def speech(self) -> SpeechRequest:
        """The same request to `/v1/audio/speech`."""
        return SpeechRequest(
            input=self.text,
            response_format=self.output_format,
            max_new_tokens=self.max_tokens,
            guidance_scale=self.cfg_scale,
            temperature=self.temperature,
            top_p=self.top_p,
            speed=self.speed_factor,
            top_k=self.cfg_filter_top_k,
            seed=self.seed,
            split="auto" if self.split_text else "none",
            voice=SINGLE.get(self.voice_mode),
        )


def add_compat(app: FastAPI, service: Service) -> None:
    """`/tts` and the routes for its voices."""
    voices = service.voices

    def recording(name: str | None, transcript: str | None) -> ServedVoice:
        if name is None:
            raise ApiError(
                400, "clone_reference_filename is needed in this voice_mode", param="clone_reference_filename"
            )
        if name not in _recordings(voices):
            known = ", ".join(_recordings(voices)[:8]) or "none"
            told = f"there is no recording {name!r:.80}; there are: {known}"
            raise ApiError(404, told, param="clone_reference_filename", code="voice_not_found")
        voice = voices.get(name)
        return dataclasses.replace(voice, text=transcript) if transcript and transcript.strip() else voice

    @app.post("/tts", tags=["Dia-TTS-Server"], response_class=Response)
    async def tts(body: TtsRequest, request: Request) -> Response:
        """Speak a text. The sound is sent while it is made."""
        own = body.voice_mode in SINGLE
        voice = None if own else recording(body.clone_reference_filename, body.transcript)
        return await respond(service, body.speech(), request, voice)

    @app.get("/get_reference_files", tags=["Dia-TTS-Server"])
    async def reference_files() -> list[str]:
        """File names of the recordings."""
        return _recordings(voices)

    @app.get("/get_predefined_voices", tags=["Dia-TTS-Server"])
    async def predefined_voices() -> list[dict[str, str]]:
        """The same, with names to show."""
        names = _recordings(voices)
        return [{"display_name": PurePath(name).stem.replace("_", " "), "filename": name} for name in names]

    _add_upload(app, service)


def _recordings(voices: Voices) -> list[str]:
    return sorted(voice.path.name for voice in voices.all() if voice.path is not None)


def _add_upload(app: FastAPI, service: Service) -> None:
    voices = service.voices

    @app.post("/upload_reference", tags=["Dia-TTS-Server"])
    async def upload_reference(
        files: Annotated[list[UploadFile], File(description="recordings, each with its words as NAME.txt")],
        transcript: Annotated[str | None, Form(description="words of a recording without a text file")] = None,
    ) -> JSONResponse:
        """Keep recordings as voices. Needs `--uploads`."""
        require_uploads(service.options)
        sent = {PurePath(file.filename or "").name: await file.read() for file in files}
        done, failed = list[str](), list[str]()
        for name, data in sent.items():
            path = PurePath(name)
            if path.suffix == ".txt":
                continue
            words = sent.get(f"{path.stem}.txt", (transcript or "").encode())
            if f"{path.stem}.wav" in _recordings(voices):  # told as there, as over there
                done.append(f"{path.stem}.wav")
                continue
            try:
                text = words.decode("utf-8", "replace")
                if not text.strip():
                    raise ApiError(400, f"send {path.stem}.txt along, with what is said in it, or the field transcript")
                done.append(f"{(await service.in_thread(voices.add, path.stem, data, text)).name}.wav")
            except (ApiError, InputError) as error:
                failed.append(f"{name}: {error}")
        answer: dict[str, Any] = {"message": f"{len(done)} of {len(done) + len(failed)} recordings are kept"}
        answer |= {"uploaded_files": done, "all_reference_files": _recordings(voices), "errors": failed}
        return JSONResponse(answer, 400 if failed and not done else 200)
