"""Long scripts: no word is lost, nothing is cut that belongs together, segments fit the model, joints do not click."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_fast import InputError
from dia_fast.text.segmentation import LEAST_SECONDS, TRAILING, continued, join_segments, split_script
from dia_fast.text.tokenizer import TAG, encode_text, spoken_seconds, text_warnings

LONG = (
    "[S1] Good evening, and welcome back. Tonight we talk to Dr. Ada M. Finch (laughs) about the sea, its tides, and "
    "what they carry. [S2] Thank you. It is good to be here, it really is. I have been by the sea all my life, and I "
    "am still surprised by it every day. (sighs) Not everybody can say that. [S1] No. [S2] Let me begin with a story."
)

words = st.one_of(
    st.sampled_from(
        ["a", "the", "Hello,", "there.", "Dr.", "What?!", "“Yes.”", "(laughs)", "(clears throat)", "[S3]", "—"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="[]()"), min_size=1, max_size=12),
)
spaces = st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\u00a0", " \r\n "])
turns = st.tuples(st.sampled_from(["[S1]", "[S2]"]), st.lists(st.tuples(spaces, words), min_size=1, max_size=60))
scripts = st.lists(turns, min_size=1, max_size=8).map(
    lambda parts: " ".join(tag + "".join(space + word for space, word in said) for tag, said in parts)
)


def said_by(text: str) -> list[tuple[str, str]]:
    """(tag, word) of every word."""
    parts = re.split(rf"({TAG.pattern})", text)
    tags = ["[S1]", *parts[1::2]]
    return [(tag, word) for tag, said in zip(tags, parts[::2], strict=True) for word in said.split()]


@settings(max_examples=150)
@given(scripts, st.floats(3, 20), st.integers(200, 1000))
def test_every_word_keeps_its_place_and_its_speaker(text: str, seconds: float, size: int) -> None:
    segments = split_script(text, max_seconds=seconds, max_bytes=size)
    assert [pair for segment in segments for pair in said_by(segment)] == said_by(text)
    for segment in segments:
        tags = TAG.findall(segment)
        assert TAG.match(segment) and segment == segment.strip()
        assert all(first != second for first, second in zip(tags, tags[1:], strict=False))
        assert spoken_seconds(segment) <= seconds and len(encode_text(segment)) <= size
        assert TAG.sub("", segment).strip(), "a segment without words"


@settings(max_examples=100)
@given(
    st.text(st.sampled_from("aé東🙂\u0301\u200d🏽🇩🇪한ᄀ"), min_size=1, max_size=300),
    st.floats(1, 5),
    st.integers(60, 200),
)
def test_an_endless_word_is_cut_between_characters(word: str, seconds: float, size: int) -> None:
    segments = split_script("[S2] " + word, max_seconds=seconds, max_bytes=size)
    assert "".join(segment.removeprefix("[S2] ") for segment in segments) == word
    assert all(spoken_seconds(segment) <= seconds and len(encode_text(segment)) <= size for segment in segments)


def test_characters_of_several_code_points_stay_whole() -> None:
    for character in ("e\u0301", "👩🏽\u200d🚀", "🇩🇪", "각", "க\u0bcd"):
        segments = split_script("[S1] " + character * 60, max_seconds=2.0, max_bytes=200)
        assert len(segments) > 1
        for segment in segments:
            assert not segment.removeprefix("[S1] ").replace(character, ""), (character, segment)


def test_cuts_prefer_turns_then_sentences_then_commas() -> None:
    assert split_script(LONG, max_seconds=100) == [" ".join(LONG.split())]
    segments = split_script(LONG)
    assert len(segments) == 2 and all(8 <= spoken_seconds(segment) <= 12 for segment in segments), (
        "a long turn shares its words"
    )
    assert segments[1].startswith("[S2] I have been") and "Dr. Ada M. Finch (laughs)" in segments[0]
    turn = "[S1] A turn of some five seconds, or a little more than that, which nothing cuts. Never. "
    assert sum(segment.count(turn.strip()) for segment in split_script((turn + "[S2] Yes. ") * 9)) == 9
    assert all(segment[-1] in ".)" for segment in segments)
    by_comma = split_script("[S1] " + "one, two three four five six seven eight, nine ten eleven twelve " * 6)
    assert len(by_comma) > 1 and all(segment.endswith((",", "twelve")) for segment in by_comma)
    named = split_script("[S1] " + "we saw Dr. Ames and J. R. Bond near St. Ives, " * 12)
    assert len(named) > 1 and all(segment.endswith(",") for segment in named), "cut after an abbreviation"
    spaces_only = split_script("[S1] " + "word " * 100)
    assert all(segment.endswith("word") for segment in spaces_only)
    lengths = [spoken_seconds(segment) for segment in spaces_only]
    assert max(lengths) - min(lengths) < 1, "segments of one turn are even"
    wide = split_script("[S1] " + "今日は天気がいいですね、散歩しましょう。" * 20, max_bytes=300)
    assert len(wide) > 1 and all(segment.endswith("。") for segment in wide)


def test_a_sound_is_never_cut() -> None:
    sound = "(clears throat very loudly indeed)"
    for width in range(30):
        segments = split_script("[S1] " + "a" * width + " " + f"{sound} " * 10, max_seconds=3)
        assert sum(segment.count(sound) for segment in segments) == 10
    glued = split_script("[S1] " + ("(laughs)" + "x" * 9) * 20, max_seconds=3)
    assert sum(segment.count("(laughs)") for segment in glued) == 20


def test_turns_of_one_speaker_become_one_and_empty_ones_go() -> None:
    assert split_script("Hello. [S1] Again. [S1] And [S2] [S1] again. [S2] Bye. [S1]", max_seconds=30) == [
        "[S1] Hello. Again. And again. [S2] Bye. [S1]"
    ]
    assert split_script("[S2] Second first.") == ["[S2] Second first."]


@pytest.mark.parametrize(("seconds", "size"), [(0.2, 500), (float("nan"), 500), (10, 15)])
def test_limits_that_hold_no_word_are_refused(seconds: float, size: int) -> None:
    with pytest.raises(InputError, match="no word fits"):
        split_script("[S1] Hello.", max_seconds=seconds, max_bytes=size)


def test_unusable_texts_are_refused() -> None:
    for text in ("", "[S1] [S2]", "\x00", b"\xff", "a" * 70_000):
        with pytest.raises(InputError):
            split_script(text)


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("[S1] A. [S2] B.", "[S1] C."), "[S1] A. [S2] B. [S1] C."),
        (("[S1] A. [S2] B.", "[S2] C. [S1] D."), "[S1] A. [S2] B. C. [S1] D."),
        (("[S2] A. [S1] B.", "[S2] C."), "[S1] A. [S2] B. [S1] C."),
        (("[S2] A.", "[S1] B.", "[S1] C."), "[S1] A. [S2] B. C."),
        (("Untagged.", "[S1] A."), "Untagged. [S1] A."),
        (("[S2] Alone.",), "[S1] Alone."),
    ],
)
def test_a_piece_goes_on_from_its_prompt(parts: tuple[str, ...], joined: str) -> None:
    assert continued(*parts) == joined


@settings(max_examples=100)
@given(scripts.map(lambda text: "[S1] begin " + text))
def test_pieces_that_follow_each_other_read_like_the_script(text: str) -> None:
    segments = split_script(text, max_seconds=5)
    for first, second in zip(segments, segments[1:], strict=False):
        read = continued(first, second)
        wrong = [warning for warning in text_warnings(read) if "alternate" in warning or "begin" in warning]
        assert not wrong
        spoken = said_by(first) + said_by(second)
        assert [word for _, word in said_by(read)] == [word for _, word in spoken]
        # The speakers are the same or all swapped.
        assert len({(read_tag == tag) for (read_tag, _), (tag, _) in zip(said_by(read), spoken, strict=True)}) == 1


sounds = st.lists(
    st.tuples(st.integers(0, 3000), st.floats(-1, 1), st.floats(0, 1), st.integers(0, 99)), min_size=1, max_size=5
)


@settings(max_examples=100)
@given(sounds)
def test_joints_do_not_click(shapes: list[tuple[int, float, float, int]]) -> None:
    """At a joint the sound is at zero and leaves it slowly, whatever the segments hold (a constant, noise)."""
    segments = []
    for count, level, noise, seed in shapes:
        segment = level + noise * np.random.default_rng(seed).uniform(-1, 1, count)
        segments.append(np.clip(segment, -1, 1).astype(np.float32))
    kept = [segment.copy() for segment in segments]
    joined = join_segments(segments, 44_100)
    assert all(np.array_equal(segment, before) for segment, before in zip(segments, kept, strict=True)), (
        "input was changed"
    )
    assert joined.dtype == np.float32 and len(joined) == sum(map(len, segments))
    assert np.all(np.abs(joined) <= np.abs(np.concatenate(segments)))
    filled = [segment for segment in segments if len(segment)]
    ends = np.cumsum([len(segment) for segment in filled])[:-1]
    for end, first, second in zip(ends, filled, filled[1:], strict=False):
        # A raised cosine of n samples moves by at most pi / 2n a sample; the sound itself is at most 1.
        if len(first) >= 882 and len(second) >= 882:
            assert joined[end - 1] == joined[end] == 0
            assert np.all(np.abs(joined[end - 5 : end + 5]) <= (np.pi * 5 / 882) ** 2)
    untouched = 441
    first = 0
    for index, segment in enumerate(filled):
        begin = untouched if index else 0
        stop = len(segment) - (untouched if index < len(filled) - 1 else 0)
        assert np.array_equal(joined[first + begin : first + max(begin, stop)], segment[begin : max(begin, stop)])
        first += len(segment)


def test_a_single_piece_is_left_alone() -> None:
    segment = np.linspace(-1, 1, 100, dtype=np.float32)
    assert np.array_equal(join_segments([segment, np.zeros(0, np.float32)], 44_100), segment)
    assert len(join_segments([], 44_100)) == 0


@settings(max_examples=150)
@given(scripts, st.floats(LEAST_SECONDS, 2), st.integers(16, 60), st.sampled_from(["", " [S1]", "[S2]"]))
def test_no_piece_is_without_words_however_scarce_the_room(text: str, seconds: float, size: int, end: str) -> None:
    segments = split_script(text + end, max_seconds=seconds, max_bytes=size)
    assert "".join(TAG.sub("", "".join(segments)).split()) == "".join(TAG.sub("", text).split())
    for segment in segments:
        assert len(encode_text(segment)) <= size
        assert bool(end) == bool(TRAILING.search(segment))


@pytest.mark.parametrize(("end", "ends"), [("[S1]", ["[S1]", "[S2]"]), ("[S2]", ["[S2]", "[S1]"]), ("", ["", ""])])
def test_a_tag_at_the_end_is_kept_for_every_piece(end: str, ends: list[str]) -> None:
    """The last speaker is [S2]; the segments end with the words of [S2] and of [S1]."""
    turn = "some words that somebody says. " * 4
    segments = split_script(f"[S1] {turn} [S2] {turn} {end}")
    last = {segment.split()[0]: segment.rpartition("says.")[2].strip() for segment in segments}
    assert last == dict(zip(["[S2]", "[S1]"], ends, strict=True))
    assert all(spoken_seconds(segment) <= 12 for segment in segments)
    assert continued("[S1] A. [S2]", "[S1] B. [S2]") == "[S1] A. B. [S2]"
