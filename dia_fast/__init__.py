"""Dia-1.6B text to speech: official weights in, audio out.

    from dia_fast import Dia

    dia = Dia.from_pretrained("nari-labs/Dia-1.6B-0626")
    dia.generate("[S1] Did you hear that? [S2] Hear what?").save("out.wav")

The names below are imported when they are first used, so `import dia_fast` costs nothing.
"""

TYPE_CHECKING = False  # as type checkers know it; typing takes time, in which Ctrl-C would show a traceback
if TYPE_CHECKING:
    from dia_fast.api import Dia
    from dia_fast.audio.audio import Audio
    from dia_fast.checkpoint.demo import demo_voice
    from dia_fast.errors import CheckpointError, DiaFastError, InputError, OutOfMemory, OutOfPages, SilentSpeech
    from dia_fast.generation.outcome import Outcome
    from dia_fast.generation.sampling_params import SamplingParams
    from dia_fast.model.config import DiaConfig
    from dia_fast.text.tokenizer import TextWarning

    __version__: str

_HOMES = {
    "Audio": "audio.audio",
    "CheckpointError": "errors",
    "Dia": "api",
    "DiaConfig": "model.config",
    "DiaFastError": "errors",
    "InputError": "errors",
    "OutOfMemory": "errors",
    "OutOfPages": "errors",
    "Outcome": "generation.outcome",
    "SamplingParams": "generation.sampling_params",
    "SilentSpeech": "errors",
    "TextWarning": "text.tokenizer",
    "demo_voice": "checkpoint.demo",
}

__all__ = [
    "Audio",
    "CheckpointError",
    "Dia",
    "DiaConfig",
    "DiaFastError",
    "InputError",
    "OutOfMemory",
    "OutOfPages",
    "Outcome",
    "SamplingParams",
    "SilentSpeech",
    "TextWarning",
    "demo_voice",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dia-fast")
        except PackageNotFoundError:
            return "0+not-installed"
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'dia_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dia_fast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
