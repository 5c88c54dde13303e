"""The delayed grid against its definition, entry by entry."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dia_fast.model.delay import FREE, apply_delay, undo_delay

EOS, PAD, BOS = 1024, 1025, 1026

patterns = st.lists(st.integers(0, 20), max_size=8).map(lambda rest: (0, *rest))


def random_frames(count: int, channels: int) -> Tensor:
    return torch.randint(0, EOS, (count, channels))


def spoken(frames: Tensor, delay: tuple[int, ...]) -> Tensor:
    """The whole grid of a speech that ended by itself: EOS after the last frame of each channel, then PAD."""
    ending = torch.tensor([EOS] + [PAD] * (max(delay) + 1))[:, None].expand(-1, len(delay))
    rows = apply_delay(torch.cat((frames, ending)), delay, BOS)
    return rows[: frames.shape[0] + max(delay) + 2]


@given(st.integers(0, 40), patterns)
def test_every_entry_of_the_grid_follows_from_its_row_and_channel(count: int, delay: tuple[int, ...]) -> None:
    frames = random_frames(count, len(delay))
    rows = apply_delay(frames, delay, BOS)
    assert rows.shape == (count + max(delay) + 1, len(delay))
    for row, codes in enumerate(rows.tolist()):
        for channel, code in enumerate(codes):
            frame = row - 1 - delay[channel]
            assert code == (BOS if frame < 0 else int(frames[frame, channel]) if frame < count else FREE)


@given(st.integers(0, 40), patterns)
def test_nothing_is_free_before_the_row_at_which_decoding_starts(count: int, delay: tuple[int, ...]) -> None:
    rows = apply_delay(random_frames(count, len(delay)), delay, BOS)
    assert (rows[:count] != FREE).all()
    assert rows[count, 0] != FREE


@given(st.integers(0, 40), patterns)
def test_undoing_gives_the_frames_back(count: int, delay: tuple[int, ...]) -> None:
    frames = random_frames(count, len(delay))
    assert torch.equal(undo_delay(spoken(frames, delay), delay, EOS), frames)


@given(st.integers(0, 60), st.integers(0, 40), patterns)
def test_a_cut_grid_gives_the_frames_that_are_complete(cut: int, count: int, delay: tuple[int, ...]) -> None:
    frames = random_frames(count, len(delay))
    rows = spoken(frames, delay)[:cut]
    complete = max(min(cut - 1 - max(delay), count), 0)
    assert torch.equal(undo_delay(rows, delay, EOS), frames[:complete])


def test_codes_that_are_no_sound_become_silence() -> None:
    delay = (0, 2)
    rows = spoken(random_frames(6, 2), delay).to(torch.int32)
    rows[4, 1], rows[5, 1] = BOS, FREE  # frames 1 and 2
    frames = undo_delay(rows, delay, EOS)
    assert frames[1, 1] == frames[2, 1] == 0
    assert ((frames >= 0) & (frames < EOS)).all()
