"""Transcripts to bytes: what goes through, what is warned about, what is refused."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.errors import InputError
from dia_fast.text.tokenizer import (
    ABSURD_BYTES,
    MAX_BYTES,
    TextWarning,
    encode_text,
    join_prompt,
    text_warnings,
    warn_about,
)

MORE = " And some more words, so that it takes more than five seconds to say all of them."
GOOD = "[S1] Dia is a text to dialogue model. [S2] You get full control over scripts and voices. [S1] Wow."

# Characters of every UTF-8 length; no surrogates, and none of the three that mean something else inside the model.
spoken = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\x01\x02"), min_size=1, max_size=200)
scripts = st.lists(st.one_of(st.sampled_from(["[S1]", "[S2]", "[S3]", "[s1]", " "]), spoken), min_size=1, max_size=12)


def test_tags_become_one_byte_each_and_nothing_else_changes() -> None:
    assert encode_text("[S1] Hé[S2]!") == [1, 32, 72, 0xC3, 0xA9, 2, 33]
    assert encode_text("[S3] [s1] [S 1]") == list(b"[S3] [s1] [S 1]")
    assert encode_text("  kept  ") == list(b"  kept  ")


def test_bytes_are_read_as_utf8() -> None:
    assert encode_text("[S1] Zoë".encode()) == encode_text("[S1] Zoë")


def test_too_long_is_cut_at_exactly_the_positions_of_the_encoder() -> None:
    text = "[S1] " + "é" * 600
    ids = encode_text(text)
    assert len(ids) == MAX_BYTES
    assert bytes(ids) == (b"\x01 " + "é".encode() * 600)[:MAX_BYTES]
    assert len(encode_text(text, max_length=10)) == 10


@given(scripts)
def test_any_script_is_encoded_or_refused(parts: list[str]) -> None:
    text = "".join(parts)
    words = text.replace("[S1]", "").replace("[S2]", "")
    if not words.strip():
        with pytest.raises(InputError):
            encode_text(text)
        return
    ids = encode_text(text, max_length=ABSURD_BYTES)
    assert all(0 < i < 256 for i in ids)
    back = bytes(ids).replace(b"\x01", b"[S1]").replace(b"\x02", b"[S2]")
    assert back.decode() == text
    assert encode_text(text, max_length=7) == ids[:7]
    text_warnings(text)


@given(st.binary(max_size=64))
def test_any_bytes_are_encoded_or_refused(data: bytes) -> None:
    try:
        ids = encode_text(data)
    except InputError as error:
        assert len(str(error)) > 20
    else:
        assert bytes(ids) == data.removeprefix("\ufeff".encode()).replace(b"[S1]", b"\x01").replace(b"[S2]", b"\x02")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello there." + MORE, "does not begin with a speaker tag"),
        ("(sighs) [S1] Hello there." + MORE, "does not begin with a speaker tag"),
        ("[S2] Hello there." + MORE, "begins with [S2]"),
        ("[S1] Hello. [S1] It is me again." + MORE, "[S1] is followed by [S1]"),
        ("[S1] Hello. [S3] Hi." + MORE, "[S3] is not a speaker tag"),
        ("[S1] Hello. [s2] Hi." + MORE, "[s2] is not a speaker tag"),
        ("[S1] Hello. [S 2] Hi." + MORE, "[S 2] is not a speaker tag"),
        ("[S1] " + "word " * 300, "takes 1502 bytes and the model reads 1024"),
        ("[S1] " + "word " * 100, "about 33 s of speech"),
        ("[S1] Hello.", "about 0.5 s of speech, and below 5 s"),
        (GOOD + " There are 12 of them.", "12 is written in digits"),
        (GOOD + " See https://example.org/a1 for more.", "https://example.org/a1 is a web address"),
        (GOOD + " Well \U0001f642 then.", "is a symbol that the model cannot read"),
        (GOOD + " (laughs) No (coughs) more (sighs) please.", "more than 2 sounds in brackets"),
    ],
)
def test_what_sounds_bad_is_said_once(text: str, expected: str) -> None:
    found = text_warnings(text)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    "text", [GOOD, "\n [S1] Leading space." + MORE, GOOD + " [S2]", "[S1] One [speaker] (laughs) alone." + MORE]
)
def test_good_texts_pass_in_silence(text: str) -> None:
    assert text_warnings(text) == []


def test_the_length_of_the_prompt_does_not_count_as_speech_to_come() -> None:
    text = "[S1] " + "word " * 70
    assert "of speech" in text_warnings(text)[0]
    assert text_warnings(text, prompt_seconds=8.0) == []


def test_a_full_text_is_not_called_too_long() -> None:
    assert not any("left out" in w for w in text_warnings("[S1]" + "x" * (MAX_BYTES - 1)))
    assert any("left out" in w for w in text_warnings("[S1]" + "x" * MAX_BYTES))


def test_warnings_carry_their_category_and_blame_the_caller() -> None:
    with pytest.warns(TextWarning, match="begin with") as record:
        warn_about("Hello.")
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about(GOOD)


def test_a_clone_speaks_the_transcript_first() -> None:
    assert join_prompt("[S1] This is me. ", " [S2] And you?") == "[S1] This is me. [S2] And you?"
    with pytest.raises(InputError, match="empty"):
        join_prompt("", "[S1] Hello.")


def test_a_byte_order_mark_is_no_text() -> None:
    for text in ("\ufeff" + GOOD, ("\ufeff" + GOOD).encode()):
        assert encode_text(text) == encode_text(GOOD) and text_warnings(text) == []
    with pytest.raises(InputError, match="empty"):
        encode_text("\ufeff")
    assert join_prompt("\ufeff[S1] A.", "\ufeffB.") == "[S1] A. B."
