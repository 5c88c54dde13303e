"""Sentences of the demo voice that ships: a closed vocabulary, sentences drawn from it, and those kept for testing.

A sentence is held out if a hash of its words says so, whoever speaks it and wherever: no training recording has it.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from examples.demo_voice.turns import words

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = ("red", "green", "blue", "yellow", "black", "white")
THINGS = ("door", "box", "window", "table", "car", "book")
PLACES = ("house", "kitchen", "garden", "office")
OPENINGS = ("Hello", "Good morning", "Good evening", "Yes", "No", "Thank you")
SIZES = (0.93, 1.0, 1.07)  # of people: what divides their pitch and formants
NUMBERS = 0.4  # the share of sentences with digits
HELD_OUT = 10  # per cent of all sentences


@dataclass(frozen=True)
class Line:
    """A recording to make: its turns, `(speaker 1 or 2, sentence)`, and how large the two people are."""

    turns: tuple[tuple[int, str], ...]
    sizes: tuple[float, float]  # of speaker 1 and 2, of `SIZES`

    @property
    def text(self) -> str:
        """The transcript, as Dia reads it."""
        return " ".join(f"[S{speaker}] {sentence}" for speaker, sentence in self.turns)


def sentence(draw: random.Random, numbers: float = NUMBERS) -> str:
    """One sentence, such as "Yes, the red book is in the garden."; its words are those of `vocabulary`."""
    kind = draw.random()
    if draw.random() < numbers:
        digits = " ".join(draw.choices(DIGITS, k=draw.choice((2, 3, 3, 4))))
        core = f"{draw.choice(('the code is', 'my number is', 'your number is', 'please call'))} {digits}"
    elif kind < 5 / 12:
        core = f"please {draw.choice(('open', 'close'))} the {draw.choice(COLORS)} {draw.choice(THINGS)}"
    elif kind < 10 / 12:
        core = f"the {draw.choice(COLORS)} {draw.choice(THINGS)} is in the {draw.choice(PLACES)}"
    else:
        first, second = draw.sample(OPENINGS, 2)
        return f"{first}, {second.lower()}."
    if draw.random() < 0.35:
        return f"{draw.choice(OPENINGS)}, {core}."
    return f"{core[0].upper()}{core[1:]}."


def vocabulary() -> list[str]:
    """All words, in lower case."""
    words = "the code is my your number please call open close in".split()
    for group in (DIGITS, COLORS, THINGS, PLACES, OPENINGS):
        words += [word for entry in group for word in entry.lower().split()]
    return sorted(set(words))


def sentences(turn: str) -> list[str]:
    """The sentences of a turn, each with its full stop."""
    return [f"{part}." for part in turn.removesuffix(".").split(". ")]


def is_held_out(text: str) -> bool:
    """Tell whether this sentence is kept for testing."""
    return zlib.crc32(" ".join(words(text)).encode()) % 100 < HELD_OUT


def lines(
    seed: int, *, held_out: bool, turns: int | None = None, sentences: int = 1, numbers: float = NUMBERS
) -> Iterator[Line]:
    """Endless recordings, of training or of held-out sentences only; the same ones for the same seed.

    turns: how many each has; by default one or two, a third of them two. Speakers take turns, either may begin.
    sentences: of each turn. numbers: the share of sentences with digits.
    """
    draw = random.Random(seed)
    while True:
        count = turns or (2 if draw.random() < 1 / 3 else 1)
        first, said = draw.randrange(2), []
        for turn in range(count):
            spoken = []
            for _ in range(sentences):
                text = sentence(draw, numbers)
                while is_held_out(text) is not held_out:
                    text = sentence(draw, numbers)
                spoken.append(text)
            said.append(((first + turn) % 2 + 1, " ".join(spoken)))
        yield Line(tuple(said), (draw.choice(SIZES), draw.choice(SIZES)))
