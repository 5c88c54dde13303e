"""Sampling parameters of one generation, checked in one place for every door."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, TypedDict

from dia_fast.errors import InputError, shown
from dia_fast.utils.values import real_number, whole_number

MAX_SEED = 2**64 - 1
RANDOM_SEED = -1  # as other tools write it


class Default(Enum):
    """Stands in a signature for "as the checkpoint says"."""

    CHECKPOINT = "the checkpoint's"

    def __repr__(self) -> str:
        return self.value


CHECKPOINT = Default.CHECKPOINT


@dataclass(frozen=True)
class SamplingParams:
    """Checked values; the defaults are those of Dia's authors and of transformers.

    Args:
        max_new_tokens: Most rows to generate, 1 / 86.13 s each, the 15 that the delay pattern adds included.
        guidance_scale: 1 to 100; `None` or 1 turns guidance off (half the work, less faithful to the text).
        temperature: 0 to 100; 0 is greedy.
        top_p: Above 0, at most 1.
        top_k: 1 or more, `None` for all.
        do_sample: False takes the likeliest code each time, whatever temperature, top_p, top_k and seed are.
        seed: 0 to 2^64 - 1, or `None` for a random one; -1 draws one at once, and the object holds it.
        retries: How often a segment that stays silent is tried again, each time with a seed derived from its own.

    Raises:
        InputError: Naming the parameter and its value.
    """

    max_new_tokens: int = 3072
    guidance_scale: float | None = 3.0
    temperature: float = 1.2
    top_p: float = 0.95
    top_k: int | None = 45
    do_sample: bool = True
    seed: int | None = None
    retries: int = 2

    GUIDANCE: ClassVar[tuple[float, float]] = (1, 100)
    TEMPERATURE: ClassVar[tuple[float, float]] = (0, 100)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens, 1, None))
        if self.guidance_scale is not None:
            wanted = "None (no guidance) or from {:g} to {:g}".format(*self.GUIDANCE)
            put(self, "guidance_scale", _number("guidance_scale", self.guidance_scale, *self.GUIDANCE, wanted))
        wanted = "from {:g} (greedy) to {:g}".format(*self.TEMPERATURE)
        put(self, "temperature", _number("temperature", self.temperature, *self.TEMPERATURE, wanted))
        top_p = real_number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {shown(self.top_p)}; 1 keeps every candidate")
        put(self, "top_p", top_p)
        if self.top_k is not None:
            put(self, "top_k", whole_number("top_k", self.top_k, 1, 2**31 - 1, "None keeps every candidate"))
        if not isinstance(self.do_sample, bool):
            raise InputError(f"do_sample must be True or False, not {shown(self.do_sample)}")
        if self.seed is not None:
            seed = whole_number("seed", self.seed, RANDOM_SEED, MAX_SEED, "-1 or None draws one")
            put(self, "seed", random_seed() if seed == RANDOM_SEED else seed)
        put(self, "retries", whole_number("retries", self.retries, 0, 100, "0 for none"))

    def given(self, **values: Any) -> "SamplingParams":
        """Replace some parameters.

        Args:
            **values: By name; `CHECKPOINT` leaves one as it is.

        Raises:
            InputError: For a value that cannot be used.
        """
        return replace(self, **{name: value for name, value in values.items() if value is not CHECKPOINT})

    @property
    def guided(self) -> bool:
        """True if a second, unconditional row is computed."""
        return self.guidance_scale is not None and self.guidance_scale != 1.0

    @property
    def greedy(self) -> bool:
        """True if the likeliest code is taken each time."""
        return not self.do_sample or self.temperature == 0.0


class AnySamplingParams(SamplingParams):
    """Settings of any guidance and any temperature, for programs that were written without bounds."""

    GUIDANCE = (-1e6, 1e6)
    TEMPERATURE = (0, 1e6)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords of a call, but the seed: a call takes one for each text."""

    max_new_tokens: int
    guidance_scale: float | None
    temperature: float
    top_p: float
    top_k: int | None
    do_sample: bool
    retries: int


# What `generation_config.json` may say. Its `max_length` counts other rows and is not taken.
FROM_FILE = ("max_new_tokens", "guidance_scale", "temperature", "top_p", "top_k", "do_sample")


def from_generation_config(data: Mapping[str, Any]) -> SamplingParams:
    """The defaults of a checkpoint, as transformers' `generate` takes them; what the file lacks is as in the class.

    Args:
        data: The contents of `generation_config.json`.

    Raises:
        InputError: For a value that cannot be used.
    """
    named = {name: data[name] for name in FROM_FILE if data.get(name) is not None}
    if named.get("top_k") == 0:
        named["top_k"] = None  # transformers' "all"
    return SamplingParams(**named)


def named_seed(name: str) -> int:
    """Derive the seed that goes by a name, such as a voice's: the same one on every machine.

    Raises InputError for a name that is empty, or a number that was meant to be one.
    """
    if not name.strip() or name.strip().lstrip("+-").isdigit():
        raise InputError(f"seed must be an integer or the name of a voice, not the text {shown(name)}")
    spelled = name.strip().casefold().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(spelled).digest()[:8], "little") >> 1


def random_seed() -> int:
    """A seed from the system's randomness, short enough to be read out and typed again."""
    return secrets.randbits(32)


def _number(name: str, value: object, least: float, most: float, wanted: str) -> float:
    number = real_number(name, value)
    if not least <= number <= most:  # also catches NaN
        raise InputError(f"{name} must be {wanted}, not {shown(value)}")
    return number
