"""What the decode attentions bring to the cache for a later launch: all of it, nothing else, and with no effect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast import launches
from dia_kernels import bring, launch
from dia_kernels.cross_attention import cross_attention
from tests.kernels.paged_cases import fresh_workspace, same_bits
from tests.kernels.support import DTYPES, poisoned
from tests.kernels.test_cross_attention import Case

PIECES = bring.PIECES.value


@given(
    wanted=st.integers(1024, 64 << 20),
    size=st.integers(0, 40 << 20).map(lambda size: size // 16 * 16),
    half=st.integers(0, 1),
    splits=st.integers(1, 60),
)
def test_the_programs_together_bring_a_half_from_its_beginning(wanted: int, size: int, half: int, splits: int) -> None:
    shares = bring.shares(wanted, size, half, splits)
    workers = torch.arange(shares["EXTRA"] * splits * PIECES)
    starts = torch.minimum(shares["FROM"] + workers * shares["PIECE"], torch.tensor(shares["TO"] - shares["PIECE"]))
    if size == 0:
        assert not any(shares.values())
        return
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


@pytest.mark.parametrize("rows", [2, 8, 32])
def test_a_step_of_few_rows_has_programs_more_in_both_attentions(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MiB of the gate half by one, of the up half by the other; beyond 8 rows nothing."""
    seen: dict[str, list[tuple[tuple[int, ...], dict[str, Any]]]] = {}

    def note(run: Any, kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        seen.setdefault(kernel.fn.__name__, []).append((grid, meta))

    file = tmp_path / "table.json"
    monkeypatch.setenv("DIA_KERNELS_TABLE", str(file))
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    for size in (0, 4096):
        file = tmp_path / f"{size}.json"
        monkeypatch.setenv("DIA_KERNELS_TABLE", str(file))
        file.write_text(json.dumps({op: [{"use": {"BRING": size}}] for op in ("rope_attention", "cross_attention")}))
        with launch.listening(note):
            launches.decode(rows, torch.bfloat16)
    half = 8192 * 2048 * 2
    for name, begin in (("_rope_attention", 0), ("_cross_attention", half)):
        (bare, without), (grid, meta) = seen[name]
        assert without["EXTRA"] == 0 and grid[1] == bare[1] and grid[0] == bare[0] + meta["EXTRA"]
        assert (meta["FROM"], meta["TO"]) == ((begin, begin + (4 << 20)) if rows <= bring.MOST_ROWS else (0, 0))
        assert bool(meta["EXTRA"]) == (rows <= bring.MOST_ROWS) and meta["SETTLED"]


def test_what_cannot_be_brought_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((70,), device, torch.float16)
    out, weights = case.q.clone(), torch.zeros(2, 4096, dtype=torch.float16, device=device)
    arguments = case.arguments()
    workspace = fresh_workspace(1, case.heads, case.head_dim, arguments[3], case.page_size)
    configuration = launch.configuration
    monkeypatch.setattr(launch, "configuration", lambda *args, **shape: configuration(*args, **shape) | {"BRING": 1})
    for arch, upcoming, said in (
        ("sm_80", weights, "sm_80 has no bulk prefetch"),
        ("gfx942", weights, "gfx942 has no bulk prefetch"),
        ("sm_90", weights.flatten()[1:8001], "upcoming: .* multiples of 16"),
        ("sm_90", weights.flatten()[:8000 - 8], "upcoming: 15984 bytes .* multiples of 16"),
        ("sm_90", weights.T, "upcoming: has strides"),
    ):  # fmt: skip
        monkeypatch.setattr(launch, "architecture", lambda device, arch=arch: arch)
        with pytest.raises(ValueError, match=said):
            cross_attention(*arguments, out, workspace, upcoming)
