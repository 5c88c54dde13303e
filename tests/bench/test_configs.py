"""The default configs in `dia_kernels/configs/*.json`: complete, no dead entries, and as the documentation says."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

TRITON = pytest.importorskip("triton", reason="configs are read beside the kernels, which need Triton")

from bench import configs  # noqa: E402
from dia_kernels import aot, launcher  # noqa: E402
from dia_kernels.triton import gemv  # noqa: E402
from dia_kernels.triton.gemv_layout import Tile  # noqa: E402

FILES = sorted(launcher.CONFIGS.glob("*.json"))
DTYPES = ("bfloat16", "float16", "float32")
CONSTANTS = {"SPLIT_K", "CHUNKS", "BLOCK_R", "BLOCK_N", "DEPTH", "X_AHEAD"}


def shapes(entries: list[dict[str, Any]]) -> set[tuple[int, int]]:
    wanted = [(entry["where"].get("features", 0), entry["where"].get("hidden", 0)) for entry in entries]
    named = {(features, hidden["min"] if isinstance(hidden, dict) else hidden) for features, hidden in wanted}
    return named | {(48, 64)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_has_an_entry_and_every_entry_a_launch(path: Path) -> None:
    table = launcher.read_table(str(path))
    assert set(table) == set(gemv.OPS)
    for op, entries in table.items():
        used = set()
        for dtype, bits in itertools.product(DTYPES, (8, 16)):
            for features, hidden in shapes(entries):
                for rows in range(1, gemv.MAX_ROWS + 1):
                    facts = {"dtype": dtype, "arch": path.stem, "rows": rows, "features": features, "hidden": hidden}
                    facts["weight_bits"] = bits if bits == 8 or dtype != "float32" else 32
                    found = launcher.find_entry(path, op, facts)
                    assert found is not None, facts
                    used.add(next(i for i, entry in enumerate(entries) if entry["use"] is found))
        assert used == set(range(len(entries))), f"{path.name}, {op}: entries that no launch takes"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_entries_set_what_tables_may_tune_and_can_be_launched(path: Path) -> None:
    lanes = gemv.lanes(torch.bfloat16, path.stem)
    assert not CONSTANTS & set(lanes) and {*Tile._fields} > CONSTANTS
    for entries in launcher.read_table(str(path)).values():
        for use in (entry["use"] for entry in entries):
            assert set(use) == CONSTANTS
            assert all(value & (value - 1) == 0 for value in use.values()), "a power of two, or 0"
            assert use["BLOCK_R"] % lanes["ROW_LANES"] == 0 and use["BLOCK_N"] % 8 == 0 and use["DEPTH"] >= 1


def test_every_target_has_a_table_and_strangers_take_a_relative_s() -> None:
    assert {launcher.default_table(target) for target in aot.TARGETS} == set(FILES)
    kin = {"interpreter": "sm_80", "sm_75": "sm_80", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120",
           "gfx90a": "gfx942", "gfx950": "gfx942", "gfx1030": "gfx1100", "gfx1201": "gfx1100"}  # fmt: skip
    for arch, table in kin.items():
        assert launcher.default_table(arch).stem == table


def test_the_page_is_current(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert configs.main(["--check"]) == 0, "run python -m bench.configs"
    monkeypatch.setattr(configs, "PAGE", tmp_path / "page.md")
    assert configs.main(["--check"]) == 1 and "python -m bench.configs" in capsys.readouterr().out
    assert configs.main([]) == 0 and configs.main(["--check"]) == 0


def test_the_page_has_a_line_for_every_entry() -> None:
    """As many values of every op and file as there are entries, and rows that follow one another."""
    sections = configs.page().split("\n## ")[1:]
    assert len(sections) == len(FILES)
    for path, section in zip(FILES, sections, strict=True):
        for op, entries in launcher.read_table(str(path)).items():
            lines = [line.split("|")[1:-1] for line in section.splitlines() if f"`{op}`" in line]
            assert len(lines) == len(entries)
            ends = [tuple(map(int, re.findall(r"\d+", line[3]))) for line in lines]
            assert all(first <= last for first, last in ends)
            assert sorted({last for _, last in ends} | {0})[-1] == gemv.MAX_ROWS
            starts = {first for first, _ in ends} - {1}
            assert starts <= {last + 1 for _, last in ends}


@pytest.mark.parametrize("path", sorted((configs.PAGE.parents[1] / "bench" / "candidates").glob("*.json")))
def test_candidates_change_something_and_keep_a_row_s_bits_whatever_the_rows(path: Path) -> None:
    for op, entries in launcher.read_table(str(path)).items():
        for where in (entry["where"] for entry in entries):
            shape = {"features": where.get("features", 2048), "hidden": where.get("hidden", 2048)}
            default, arch, dtype = gemv._DEFAULTS[op], where["arch"], getattr(torch, where["dtype"])
            found = [
                launcher._configuration(op, default, dtype, arch, str(path), rows=rows, weight_bits=16, **shape)
                for rows in range(1, 65)
            ]
            rows = where.get("rows", {}).get("min", 1)
            assert found[rows - 1] != default(dtype, arch, rows=rows, **shape)
            assert len({(use["SPLIT_K"], use["CHUNKS"], use["num_warps"]) for use in found}) == 1
