"""Figures in the documentation come from files, and the tables are what the command makes of them."""

import re
from pathlib import Path

import pytest

from bench import published
from bench.published import FOLDER, PLACE, TABLES, pages
from bench.tools.results import read
from dia_fast.errors import InputError

# Tables with numbers that no benchmark measured, by the beginning of their first line.
NOT_MEASURED = {
    "| exit status |": "no figure",
    "| launch | op |": "computed from shapes: docs/kernels.md",
    "| op | encoder | decoder |": "computed from shapes: docs/kernels.md",
    "| predicted |": "printed by dia-fast plan",
    "| `first_chunk_seconds` |": "computed from the delay pattern",
    "| precision | size": "computed from shapes",
    "| requests at once |": "printed by dia-fast info",
    "| op | dtype | shape | rows |": "written by bench.configs",
    "| size of Dia-1.6B, bf16, x86 CPU |": "printed by dia-fast, of one load",
    "| chunk length, float32, CPU": "bounds that tests hold",
    "| | memory |": "counted by tests/training/test_memory.py",
    "| words heard right": "measured by an evaluation that make eval-voice has replaced, as the page says",
    "| | mean KL |": "printed by dia-fast doctor",
}
TABLE = re.compile(r"(?P<before>[^\n]*\n)(?P<head>\|[^\n]*\n)(?P<rule>\|[-:| ]+\|)\n")


def unmarked(text: str) -> list[str]:
    """Return the first lines of tables with columns of numbers that say no file."""
    return [
        found["head"].strip()
        for found in TABLE.finditer(text)
        if "---:" in found["rule"]
        and not found["before"].startswith("<!-- figures: ")
        and not found["head"].startswith(tuple(NOT_MEASURED))
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_table_of_figures_has_a_file(page: Path) -> None:
    assert not unmarked(page.read_text(encoding="utf-8"))


def test_the_check_of_tables_itself() -> None:
    table = "| way | ms |\n|---|---:|\n| ours | 1 |\n"
    assert unmarked(f"text\n\n{table}") == ["| way | ms |"]
    assert not unmarked(f"<!-- figures: x.json -->\n{table}") and not unmarked("\n| a | b |\n|---|---|\n")


def test_every_table_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main(["--check"]) == 0, capsys.readouterr().err


def test_every_file_is_read_and_quoted() -> None:
    quoted = {
        name.strip()
        for page in pages()
        for found in PLACE.finditer(page.read_text(encoding="utf-8"))
        for name in found["files"].split(",")
    }
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/*.json")}
    assert there == quoted and {*TABLES} <= quoted
    for name in there:
        assert read(FOLDER / name)["status"] == 0, name
        assert re.match(r"\d{4}-\d\d-\d\d-[a-z0-9-]+/", name), name


def test_a_page_that_is_not_current_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    current = (published.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    page.write_text(current.replace("159", "160"), encoding="utf-8")
    monkeypatch.setattr(published, "pages", lambda: [page])
    assert published.main(["--check"]) == 1 and "not current: page.md" in capsys.readouterr().err
    assert published.main([]) == 0 and page.read_text(encoding="utf-8") == current


def test_a_file_that_is_not_known_is_named() -> None:
    with pytest.raises(InputError, match=r"some/file\.json: bench.published does not know"):
        published.written("<!-- figures: some/file.json -->\n| a |\n")
    [first, *_] = TABLES
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        published.written(f"<!-- figures: {first}, none.json -->\n| a |\n")


def test_missing_figures_are_empty_cells() -> None:
    lines = published.Lines([("a", "{a}"), ("b", "{b:.1f}"), ("c", "{c:mega}"), ("d", "{d:short}")])
    written = [*lines.write([{"a": "x", "b": None, "c": 2_400_000, "d": 2121.0}, {"a": "y", "d": 0.5}])]
    assert written == ["| a | b | c | d |", "|---|---:|---:|---:|", "| x |  | 2 | 2121 |", "| y |  |  | 0.5 |"]
