"""What the decode attentions bring to the cache for a later launch: all of it, nothing else, and with no effect."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_kernels import bring
from dia_kernels.cross_attention import cross_attention
from tests.kernels.paged_cases import fresh_workspace, same_bits
from tests.kernels.support import DTYPES, poisoned
from tests.kernels.test_cross_attention import Case

PIECES = bring.PIECES.value


@given(
    wanted=st.integers(1024, 64 << 20),
    size=st.integers(16, 40 << 20).map(lambda size: size // 16 * 16),
    half=st.integers(0, 1),
    splits=st.integers(1, 60),
)
def test_the_programs_together_bring_a_half_from_its_beginning(wanted: int, size: int, half: int, splits: int) -> None:
    shares = bring.shares(wanted, size, half, splits)
    workers = torch.arange(shares["EXTRA"] * splits * PIECES)
    starts = torch.minimum(shares["FROM"] + workers * shares["PIECE"], torch.tensor(shares["TO"] - shares["PIECE"]))
    assert shares["PIECE"] % 16 == 0 and shares["FROM"] % 16 == 0  # as the instruction wants it
    assert shares["FROM"] == half * size and shares["TO"] - shares["FROM"] == min(wanted, size) // 16 * 16
    assert starts[0] == shares["FROM"] and starts[-1] + shares["PIECE"] == shares["TO"]
    assert (starts.diff() <= shares["PIECE"]).all() and (starts >= shares["FROM"]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_same_with_something_to_bring(dtype: torch.dtype, device: torch.device) -> None:
    """On GPUs of Hopper's kind programs are added; everywhere the weights stay as they are."""
    case = Case((70, 0, 200), device, dtype)
    out, upcoming = poisoned((3, 32), dtype, device), torch.arange(6000, device=device).to(dtype).view(2, -1)
    before, arguments = upcoming.clone(), case.arguments()
    workspace = fresh_workspace(3, case.heads, case.head_dim, arguments[3], case.page_size)
    cross_attention(*arguments, out, workspace, upcoming)
    assert same_bits(out, case.run()) and same_bits(upcoming, before)
