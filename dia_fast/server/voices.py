"""Names that requests may use for a voice."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from dia_fast.server.errors import ApiError

OPENAI_VOICES = tuple("alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split())
"""Names that clients of the OpenAI API send, some of them no other."""


@dataclass(frozen=True)
class ServedVoice:
    """A voice by name.

    Args:
        name: As requests write it.
        kind: `"seed"` for one that is only a seed, `"recording"`, or `"builtin"`.
        codes: Of its recording, `[frames, channels]`.
        text: What is said in the recording.
        seed: For requests that name none.
        temperature: For requests that name none.
        speaker: Tag put in front of a text without tags.
    """

    name: str
    kind: str
    codes: Tensor | None = field(default=None, repr=False)
    text: str | None = None
    seed: int | None = None
    temperature: float | None = None
    speaker: str = "[S1]"
    created: int = field(default_factory=lambda: int(time.time()))


class Voices:
    """All voices of a server."""

    def __init__(self) -> None:
        named = [ServedVoice("dialogue", "builtin"), ServedVoice("S1", "builtin")]
        named.append(ServedVoice("S2", "builtin", speaker="[S2]"))
        # A seed of its own makes a name sound alike for the same text, and mostly alike for others.
        named += [ServedVoice(name, "seed", seed=1 + index) for index, name in enumerate(OPENAI_VOICES)]
        self._builtin = {voice.name: voice for voice in named}

    def __len__(self) -> int:
        return len(self.all())

    def all(self) -> list[ServedVoice]:
        """In the order in which to show them."""
        return list(self._builtin.values())

    def get(self, name: str | None) -> ServedVoice:
        """The voice of a name; the one for dialogues without. Raises an error 400 for a name that is unknown."""
        if name is None:
            return self._builtin["dialogue"]
        found = self._builtin.get(name)
        if found is None:
            known = ", ".join(voice.name for voice in self.all()[:8])
            raise ApiError(
                400, f"voice {name!r:.80} is unknown; there are {known} and others: see /v1/audio/voices", param="voice"
            )
        return found
