"""Texts of the demo voice: a few hundred words, templates that make turns of them, and sentences kept for scores.

Scores are taken on `held_out.txt`, sentences that people wrote from the words of the list and no template makes, and
on turns of templates that a hash keeps from training (`turns.text_is_held_out`).
"""

import random
import re
from collections.abc import Iterable
from pathlib import Path

from examples.demo_voice.turns import words

HELD_OUT_SENTENCES = Path(__file__).with_name("held_out.txt")
SENTENCES = (1, 1, 2, 2, 3)  # of a turn, to draw from
LOOSE = 0.2  # the share of the sentences that are words in any order, so that a word is learnt without its template

# A name in braces is drawn from its list.
LISTS = {
    "number": "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve",
    "digit": "zero|one|two|three|four|five|six|seven|eight|nine",
    "tens": "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "when": "today|tomorrow|tonight|now|later|soon|this morning|this evening|next week|on the weekend",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "color": "red|blue|green|yellow|black|white|brown|orange|grey",
    "kind": "big|small|old|new|good|nice|long|short|warm|cold|fast|slow|heavy|light|empty|full|clean|dark|quiet|"
    "strange",
    "thing": "book|box|door|window|table|chair|car|key|phone|letter|bag|cup|picture|lamp|bottle|coat|map|ticket|clock|"
    "radio|camera|umbrella|computer|piano",
    "place": "garden|kitchen|house|office|school|station|street|park|market|shop|hotel|museum|library|hospital|airport|"
    "river|bridge|city|village|beach",
    "food": "coffee|tea|water|milk|bread|cheese|cake|soup|rice|fish|chicken|salad|juice|wine",
    "animal": "dog|cat|horse|bird|fish|mouse",
    "person": "brother|sister|mother|father|friend|doctor|teacher|neighbour|son|daughter",
    "name": "Anna|Peter|Mary|John|Sarah|David|Lucy|Tom",
    "weather": "sunny|windy|cloudy|rainy|cold|warm|hot|foggy",
    "way": "left|right|straight|back",
    "move": "walk|drive|run|go|travel",
    "feel": "happy|tired|hungry|late|early|ready|busy|sorry|sure|afraid",
    "do": "open|close|find|bring|take|buy|sell|clean|move|carry|paint|repair|lose|hide",
}
TEMPLATES = """
Good morning, {name}. Did you sleep well?
Good evening. My name is {name}.
Hello, how are you {when}?
Hi {name}, it is nice to see you again.
I am {feel}, thank you. And you?
Thank you very much.
You are welcome.
Goodbye, {name}.
See you {when}!
Good night, and sleep well.
Please {do} the {color} {thing}.
Please {do} the {thing} in the {place}.
Could you {do} the {thing} for me?
Can you help me, please?
Where is the {kind} {thing}?
The {color} {thing} is in the {place}.
The {thing} is {color}, and the {thing} is {color}.
I think the {thing} is behind the {thing} in the {place}.
My number is {digit} {digit} {digit}, {digit} {digit} {digit}.
The code is {digit} {digit} {digit} {digit}.
Please call {digit} {digit} {digit}.
Your number is {digit} {digit} {digit}.
It costs {tens} {number} dollars.
That is too much. I have only {tens} dollars.
What time is it?
It is {number} o'clock.
It is half past {number}.
The train leaves at quarter to {number} from platform {number}.
When does the bus to the {place} leave?
We will meet on {day} at {number}.
My birthday is in {month}.
In {month} we always {move} to the {place}.
I have never been to the {place} in {month}.
It will be {weather} {when}.
What is the weather like {when}?
Yesterday it was {weather} and {weather}.
I would like {number} cups of {food} and some {food}, please.
Do you have any {food}?
No, but we have {food} and {food}.
An apple and an orange, please.
The {food} is very {kind}.
Turn {way} at the {place}, then {move} {way}.
Is the {place} far from here?
No, it is only {number} minutes from the {place}.
Yes, you have to {move} for {number} hours.
My {person} works in a {place}.
Do you know my {person}?
Tell me about your {person}.
{name} has a {kind} {animal} and {number} {kind} chairs.
The {animal} is under the {thing}.
I saw a {color} {animal} near the {place}.
Are you {feel}?
Yes, I am very {feel}.
No, I am not {feel} at all.
Did you hear that?
Hear what?
There it is again!
I did not hear anything.
That is a very good idea.
I do not think so.
Of course not.
Maybe you are right.
Are you sure?
I hope so.
Let us go to the {place} {when}.
We should {do} the {thing} before {day}.
Just a moment.
Wait, I will {do} it.
Call me when you are {feel}.
Let us talk about the {weather} weather.
What shall we talk about {when}?
This is a small voice that comes with the program.
It speaks fast, and it speaks without a network.
Every word that I say was made by a computer.
Listen to the difference between my voice and yours.
We take turns when we talk.
""".strip().splitlines()


def sentence(draw: random.Random) -> str:
    """A sentence of a template, or two that belong together."""
    text = re.sub(r"\{(\w+)\}", lambda found: draw.choice(LISTS[found[1]].split("|")), draw.choice(TEMPLATES))
    return text[0].upper() + text[1:]


def loose(draw: random.Random) -> str:
    """Three to eight words of the list in any order."""
    chosen = [_PROPER.get(word, word) for word in draw.choices(vocabulary(), k=draw.randint(3, 8))]
    if len(chosen) > 5:
        chosen[3] += ","
    text = " ".join(chosen) + draw.choice("..?!")
    return text[0].upper() + text[1:]


def turn(draw: random.Random, share: float = LOOSE) -> str:
    """The text of a turn: one to three sentences. share: of loose ones among them."""
    made = (loose(draw) if draw.random() < share else sentence(draw) for _ in range(draw.choice(SENTENCES)))
    return " ".join(made)


_FIXED = [re.sub(r"\{\w+\}", " ", template) for template in TEMPLATES]
_PROPER = {name.lower(): name for group in ("name", "day", "month") for name in LISTS[group].split("|")} | {"i": "I"}


def vocabulary() -> list[str]:
    """All words that templates can make, in lower case."""
    return sorted({word for text in (*_FIXED, *LISTS.values()) for word in words(text)})


def held_out_sentences(known: Iterable[str] | None = None) -> list[str]:
    """The sentences of `held_out.txt`; with `known`, those of known words only."""
    lines = HELD_OUT_SENTENCES.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    return found if known is None else [line for line in found if set(words(line)) <= set(known)]
