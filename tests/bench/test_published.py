"""Figures in the documentation come from files, and the tables are what the command makes of them."""

import re
from pathlib import Path

import pytest

from bench import published
from bench.published import FOLDER, PLACE, TABLES, pages
from bench.quoted import SENTENCES, Quote, figures_in, problems
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
MAY_MISS_BARS = ("codegen", "cpu_ratios")  # they exit with 1 below a bar, which the page then says
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
    quoted |= {source.file for told in SENTENCES.values() for source in told.values() if isinstance(source, Quote)}
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/*.json")}
    assert there == quoted and {*TABLES} <= quoted
    for name in there:
        run = read(FOLDER / name)
        assert run["status"] == (run["bench"] in MAY_MISS_BARS and run["status"] == 1), name
        assert re.match(r"\d{4}-\d\d-\d\d-[a-z0-9-]+/", name), name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_figure_in_a_sentence_has_a_file_or_a_reason(page: Path) -> None:
    assert not list(problems(page.name, page.read_text(encoding="utf-8")))


def test_pages_that_are_told_of_are_there() -> None:
    assert SENTENCES.keys() <= {page.name for page in pages()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It took 12 ms, or 3.5 GB/s.", ["12 ms", "3.5 GB/s"]),
        ("1.3 to 1.5 us with it, 20% or 2 x without", ["1.3 to 1.5 us", "20%", "2 x"]),
        ("twice\nas fast: 16.6\ntimes", ["16.6 times"]),
        ("| a | b |\n|---|---|\n| took | 3 s |\n", ["3 s"]),
        ("| a | b |\n|---|---:|\n| took | 3 s |\n", []),
        ("<!-- figures: a/b.json -->\n| took 3 s |\n", []),
        ("```sh\nsleep 3 s\n```\n`3 s` <!-- 4 s --> 8192 x 2048, sm_90 x, v1.2 s", []),
        ("3 steps, 2 GPUs, 16-bit, 1,000 rows", []),
    ],
)
def test_figures_are_numbers_with_a_unit(text: str, found: list[str]) -> None:
    assert figures_in(text) == found


def test_a_figure_in_a_sentence_must_be_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (published.ROOT / "README.md").read_text(encoding="utf-8")
    changed = text.replace("0.99 ms is 59 %", "0.98 ms is 59 %")
    assert changed != text
    [new] = problems("README.md", changed)
    assert new.startswith("README.md: 0.98 ms: say in bench/quoted.py")
    [gone] = problems("README.md", text.replace("the target is 85 %", "there is a target"))
    assert "85 % is not there" in gone
    monkeypatch.setitem(
        SENTENCES["README.md"], "59 %", Quote("2026-11-28-h200/steps.json", "{share_percent} %", {"step_ms": 1.5})
    )  # type: ignore[arg-type]
    [other] = problems("README.md", text)
    assert other == "README.md: 59 %: 2026-11-28-h200/steps.json says 41 %"
    page = tmp_path / "README.md"
    page.write_text(changed, encoding="utf-8")
    monkeypatch.setattr(published, "pages", lambda: [page])
    assert published.main(["--check"]) == 1 and "0.98 ms" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 results are"):
        Quote("2026-11-29-amd-epyc/threads.json", "{step_ms}").written()


def test_a_page_that_is_not_current_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    current = (published.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    page.write_text(current.replace("159", "160"), encoding="utf-8")
    monkeypatch.setattr(published, "pages", lambda: [page])
    assert published.main(["--check"]) == 1 and "not current: benchmarks.md" in capsys.readouterr().err
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
