"""Every exception that dia_fast raises on purpose.

Each message says what was wrong, with which value, and what would work. The command line prints it as one line and
exits with status 2, or with 1 for a NumericError, which no other argument would mend, for SilentSpeech and OutOfMemory;
whatever else escapes is a bug in dia_fast.
"""


class DiaFastError(Exception):
    """Base of all errors below."""


class InputError(DiaFastError, ValueError):
    """An argument, a text or an audio file that cannot be used."""


class CheckpointError(DiaFastError, RuntimeError):
    """A configuration, a file or a tensor of a checkpoint that is missing, damaged or not supported."""


class NumericError(DiaFastError, RuntimeError):
    """A computation whose result is no speech: values that are NaN or infinity, or no code left to choose from."""


def not_finite(where: str) -> NumericError:
    """The error about logits that are NaN or infinite.

    Args:
        where: Of which step and channel.
    """
    return NumericError(
        f"the logits of {where} are NaN or infinity. The weights may be damaged: get the checkpoint again. In "
        "float16 values may have grown too large: use bfloat16 or float32"
    )


class SilentSpeech(DiaFastError, RuntimeError):
    """A text of which nothing was spoken, where the result would be a file of sound."""


class OutOfMemory(DiaFastError, MemoryError):
    """A computation for which the device has no memory left."""


class OutOfPages(DiaFastError, RuntimeError):
    """The key-value cache has no pages left for a request."""


class AudioWarning(UserWarning):
    """A recording that can be used, but is not what it was meant to be."""


def shown(value: object) -> str:
    """A value as a message can hold it: short, and without an error of its own."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    except RecursionError:
        return f"a {type(value).__name__} nested too deep"
    return text if len(text) <= 40 else f"{text[:37]}..."
