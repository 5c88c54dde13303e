"""Requests and responses of the HTTP interface."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dia_fast.generation.sampling_params import MAX_SEED
from dia_fast.text.tokenizer import ABSURD_BYTES

ResponseFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class VoiceId(BaseModel):
    id: str = Field(max_length=128)


class SpeechOptions(BaseModel):
    """Everything about speech but its text: what a batch may say once for all of its items."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=256, description="id of `/v1/models`, or an alias of OpenAI's")
    voice: str | VoiceId | None = Field(None, description="name of `/v1/audio/voices`")
    response_format: ResponseFormat = "mp3"
    sample_rate: int | None = Field(None, description="Hz; the model's own, and 24000 for pcm")
    speed: float = Field(1.0, ge=0.25, le=4.0, description="keeps the pitch; needs the extra `media`")
    instructions: str | None = Field(None, description="accepted and ignored: Dia takes none")
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="the same seed speaks the same way; -1 draws one")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest code")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0 keeps every candidate")
    guidance_scale: float | None = Field(None, ge=1, le=100, description="how closely to follow the text; 1 is off")
    max_new_tokens: int | None = Field(None, ge=1, description="longest segment, in steps of the model")
    split: Literal["auto", "none"] = Field("auto", description="cut a text that is too long for the model")
    chunk_seconds: float = Field(0.25, gt=0, le=60, description="of sound that is decoded at a time")
    first_chunk_seconds: float = Field(0.1, gt=0, le=60)
    ref_audio: str | None = Field(None, description="a recording to go on in, as a data: URL")
    ref_text: str | None = Field(None, max_length=ABSURD_BYTES, description="what is said in it, with speaker tags")


class SpeechRequest(SpeechOptions):
    """`POST /v1/audio/speech`."""

    input: str = Field(description="the text; speakers are marked with [S1] and [S2]", max_length=ABSURD_BYTES)
    stream_format: Literal["audio", "sse"] | None = None
    stream: bool | None = Field(None, description="true is stream_format sse")
    timestamps: Literal["none", "segment", "word"] = Field(
        "none", description="segment: times of the segments, in the last event of an sse stream"
    )

    @property
    def sse(self) -> bool:
        """True if the caller asks for events."""
        return self.stream_format == "sse" or (self.stream_format is None and self.stream is True)


class BatchItem(SpeechOptions):
    """One text of a batch; what it does not say is as in the batch."""

    input: str = Field(max_length=ABSURD_BYTES)


class BatchRequest(SpeechOptions):
    """`POST /v1/audio/speech/batch`."""

    items: list[BatchItem] = Field(min_length=1, max_length=32)

    def merged(self, item: BatchItem) -> BatchItem:
        """An item with the options of the batch where it has none of its own."""
        common = {name: getattr(self, name) for name in self.model_fields_set - {"items"}}
        own = {name: getattr(item, name) for name in item.model_fields_set}
        return item.model_copy(update=common | own)


class BatchResult(BaseModel):
    index: int
    status: Literal["success", "error"]
    audio_data: str | None = Field(None, description="base64")
    media_type: str | None = None
    seed: int | None = None
    finish_reason: str | None = None
    error: "ErrorObject | None" = None


class BatchAnswer(BaseModel):
    id: str
    results: list[BatchResult]
    total: int
    succeeded: int
    failed: int


class VoiceObject(BaseModel):
    id: str
    object: Literal["audio.voice"] = "audio.voice"
    name: str
    created_at: int
    type: str


class VoiceName(BaseModel):
    id: str
    name: str


class VoiceList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VoiceObject]
    voices: list[VoiceName]


class VoiceDeleted(BaseModel):
    id: str
    object: Literal["audio.voice.deleted"] = "audio.voice.deleted"
    deleted: bool = True


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error."""

    error: ErrorObject


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dia-fast"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class AudioModelList(ModelList):
    models: list[Model] = Field(description="the same as `data`: the name that Open WebUI reads")


class Status(BaseModel):
    status: str


class TextRequest(BaseModel):
    """`POST /v1/audio/text`."""

    input: str = Field(max_length=ABSURD_BYTES)
    ref_text: str | None = Field(None, max_length=ABSURD_BYTES)


class TextReport(BaseModel):
    """Facts about a text before it is spoken."""

    bytes: int
    seconds: float = Field(description="about how long it takes to say")
    warnings: list[str]
    error: str | None = None


def extras(model: BaseModel) -> list[str]:
    """Names of fields that this server does not know."""
    extra: dict[str, Any] | None = model.model_extra
    return sorted(extra or {})
