"""Dialogues of one to eight turns, joined of the codes of turns, with pauses as people make them.

Two speakers take turns and keep their voices. Half of the dialogues have the default pair. In the others each voice
counts as given: its first half second is not learnt, so that a model without an audio prompt begins in no other voice
than the default ones, and with a prompt goes on in that of the prompt.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.errors import InputError
from examples.demo_voice.codes import KEPT, TurnCodes
from examples.demo_voice.turns import DEFAULT_PAIR

PAUSE = (2, 14)  # frames of silence between turns beside those that belong to them: 0.16 to 0.40 s between words
END = (0, 10)  # after the last turn; as in a pause, or silence would tell the end
GIVEN = 25  # frames of a voice's first words that tell who speaks
TURNS = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 8)  # to draw from
DEFAULT_SHARE = 0.5
FIRST_SHARE = 0.85  # of dialogues that [S1] begins
SENTENCES = (1, 1, 1, 2, 2, 3)  # of a turn in a short dialogue, to draw from
BREATH = (2, 20)  # frames of silence between them beside those that belong to them
TRIES = 6  # turns that are drawn where one must fit, of which the shortest is taken


@dataclass(frozen=True)
class Dialogue:
    """A transcript and its codes.

    codes: `[frames, codebooks]` int16. learnt: `[frames]` bool, frames that the loss counts. voices: of each turn.
    spoken: the frames, first and behind the last, in which each turn is heard.
    """

    text: str
    codes: Tensor
    learnt: Tensor
    voices: tuple[str, ...]
    spoken: tuple[tuple[int, int], ...] = ()


class Dialogues:
    """Draws dialogues from turns; the same ones for the same seed."""

    def __init__(self, turns: Sequence[TurnCodes], silence: Tensor, longest: int) -> None:
        """longest: frames of a dialogue; turns that are longer are left out. Raise InputError if one voice is left."""
        self.silence, self.longest = silence, longest
        self.of: dict[str, list[TurnCodes]] = {}
        for turn in turns:
            if len(turn.codes) + END[1] <= longest:
                self.of.setdefault(turn.voice, []).append(turn)
        self.voices = sorted(self.of)
        if len(self.voices) < 2:
            left = f"turns of at most {longest - END[1]} frames are of {len(self.voices)} voices"
            raise InputError(f"a dialogue needs two voices, and {left}: make more speech")

    def draw(self, seed: int, count: int, turns: Sequence[int] = TURNS) -> list[Dialogue]:
        """So many dialogues. turns: numbers of turns to draw from."""
        draw = random.Random(seed)
        return [self._one(draw, draw.choice(turns)) for _ in range(count)]

    def _pair(self, draw: random.Random) -> tuple[str, str]:
        if draw.random() < DEFAULT_SHARE and all(voice in self.of for voice in DEFAULT_PAIR):
            return DEFAULT_PAIR
        first, second = draw.sample(self.voices, 2)
        return first, second

    def _one(self, draw: random.Random, turns: int) -> Dialogue:
        pair, tag = self._pair(draw), int(draw.random() > FIRST_SHARE)
        said: list[tuple[int, TurnCodes]] = []
        left = self.longest - END[1]
        for _ in range(turns):
            turn = self._turn(draw, self.of[pair[tag]], short=turns > 4)
            if (left := left - len(turn.codes) - PAUSE[1]) < 0 and said:
                break
            said.append((tag, turn))
            tag = 1 - tag
        return joined(said, self.silence, draw)

    def _turn(self, draw: random.Random, voice: Sequence[TurnCodes], *, short: bool) -> TurnCodes:
        if short:  # that is what lets dialogues of eight turns be learnt from
            return min((draw.choice(voice) for _ in range(TRIES)), key=lambda found: len(found.codes))
        parts = [draw.choice(voice) for _ in range(draw.choice(SENTENCES))]
        codes = [parts[0].codes]
        for part in parts[1:]:
            codes += [self.silence.expand(draw.randint(*BREATH), -1), part.codes]
        if sum(map(len, codes)) + END[1] > self.longest:
            return parts[0]
        return TurnCodes(parts[0].voice, " ".join(part.text for part in parts), torch.cat(codes))


def joined(said: Sequence[tuple[int, TurnCodes]], silence: Tensor, draw: random.Random) -> Dialogue:
    """The dialogue of these turns, `(0 for [S1] or 1 for [S2], turn)`."""
    parts, learnt = list[Tensor](), list[Tensor]()

    def quiet(least: int, most: int) -> None:
        frames = draw.randint(least, most)
        parts.append(silence.expand(frames, -1))
        learnt.append(torch.ones(frames, dtype=torch.bool))

    heard, spoken = set[str](), list[tuple[int, int]]()
    for number, (tag, turn) in enumerate(said):
        if number:
            quiet(*PAUSE)
        counted = torch.ones(len(turn.codes), dtype=torch.bool)
        if turn.voice != DEFAULT_PAIR[tag] and turn.voice not in heard:
            counted[: KEPT + GIVEN] = False
        heard.add(turn.voice)
        at = sum(map(len, parts))
        spoken.append((at + KEPT, at + len(turn.codes) - KEPT))
        parts.append(turn.codes)
        learnt.append(counted)
    quiet(*END)
    text = " ".join(f"[S{tag + 1}] {turn.text}" for tag, turn in said)
    return Dialogue(text, torch.cat(parts), torch.cat(learnt), tuple(turn.voice for _, turn in said), tuple(spoken))
