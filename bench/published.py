"""Write the documentation's tables of measured figures from the files in `bench/published`.

    python -m bench.published [--check]

A page says where a table comes from by a line in front of it, `<!-- figures: FOLDER/FILE.json -->`; `TABLES` says how
it is written. Figures in sentences are told of in `bench/quoted.py`; they are checked, and not written. A folder is
named by the day and the card or processor, and holds what benchmarks wrote with `--json`; files without a commit were
typed in from older pages, whose runs left none.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from bench.quoted import problems
from bench.tools.results import flat, read
from dia_fast.errors import DiaFastError, InputError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "published"
PLACE = re.compile(r"(?P<mark><!-- figures: (?P<files>[^>]+) -->\n)(?P<table>(?:\|[^\n]*\n)+)")

Result = Mapping[str, Any]
PREDICTED, COMPILERS = "2026-12-01-predicted", "2026-11-29-compilers"
H200, ZEN3, AVX512 = "2026-11-28-h200", "2026-11-28-amd-epyc-zen3", "2026-11-29-amd-epyc-avx512-bf16"
AMX = "2026-11-29-intel-xeon-amx"


@dataclass(frozen=True)
class Lines:
    """A table with a line for each result. columns: head and template of each; all but the first are numbers."""

    columns: Sequence[tuple[str, str]]

    def write(self, results: Sequence[Result]) -> Iterator[str]:
        """Yield the lines of the table."""
        yield from _head([head for head, _ in self.columns])
        for result in results:
            yield _line(_filled(template, result) for _, template in self.columns)


@dataclass(frozen=True)
class Across:
    """A table with a column for each value of one entry, and a line for each figure.

    title: above the names of the lines; column: template of a column's head; lines: name, the results that it is of,
    and template.
    """

    title: str
    column: str
    lines: Sequence[tuple[str, Callable[[Result], bool], str]]

    def write(self, results: Sequence[Result]) -> Iterator[str]:
        """Yield the lines of the table."""
        heads = list(dict.fromkeys(_filled(self.column, result) for result in results))
        yield from _head([self.title, *heads])
        for name, chosen, template in self.lines:
            cells = {_filled(self.column, one): _filled(template, one) for one in results if chosen(one)}
            yield _line([name, *(cells.get(head, "") for head in heads)])


@dataclass(frozen=True)
class Facts:
    """A table with a line for each figure of a run. lines: name, figure, and template of its values."""

    lines: Sequence[tuple[str, str, str]]

    def write(self, results: Sequence[Result]) -> Iterator[str]:
        """Yield the lines of the table."""
        figures = {result["figure"]: result for result in results}
        yield from _head(["figure", "value"])
        for name, figure, template in self.lines:
            yield _line([name, _filled(template, figures[figure])])


def every(result: Result) -> bool:
    """Choose all results."""
    return True


def product(name: str, file: str) -> Callable[[Result], bool]:
    """Choose the results of a product of `bench.cpu_products` in a file."""
    return lambda result: result["product"] == name and result["file"] == file


TABLES: dict[str, Lines | Across | Facts] = {
    f"{H200}/steps.json": Lines(
        [
            ("version", "{version}"), ("ms per step", "{step_ms:.3f}"), ("steps/s", "{steps_per_second:.0f}"),
            ("x realtime", "{realtime:.1f}"), ("share of roofline", "{share_percent:.0f} %"),
        ]
    ),
    f"{H200}/rows.json": Lines([("requests", "{requests}"), ("rows", "{rows}"), ("ms per step", "{step_ms:.2f}")]),
    f"{H200}/ablation.json": Lines(
        [("op", "{op}"), ("us", "{saved_us:.0f}"), ("minimum for its weights", "{weights_us:.0f}")]
    ),
    f"{H200}/launches.json": Across(
        "us",
        "{launch}",
        [
            ("end of the previous launch to end of the wait", every, "{wait_us:.1f}"),
            ("end of the wait to end of the last program", every, "{run_us:.1f}"),
            ("its weights at 4.25 TB/s", every, "{weights_us:.1f}"),
        ],
    ),
    f"{H200}/decode_step.json": Lines(
        [
            ("machine", "{machine}"), ("requests", "{requests}"), ("dia-fast, ms", "{wall_min_ms:short}"),
            ("transformers, ms", "{transformers_wall_min_ms:short}"), ("ratio", "{of_the_least:.1f}"),
        ]
    ),
    f"{COMPILERS}/3.6.0-float16.json": Lines(
        [
            ("Triton", "{triton}"), ("target", "{target}"), ("dtype", "{dtype}"), ("kernels", "{kernels}"),
            ("that spill", "{spilling}"), ("most registers", "{registers}"), ("most shared memory, bytes", "{shared}"),
            ("rules broken", "{violations}"),
        ]
    ),
    f"{PREDICTED}/steps.json": Lines(
        [
            ("GPU", "{gpu}"), ("configs", "{configs}"), ("requests", "{requests}"),
            ("predicted, ms per step", "{low_ms:.2f} - {high_ms:.2f}"), ("middle", "{middle_ms:.2f}"),
            ("measured", "{measured_ms:.2f}"), ("error of the middle", "{error_percent:+.0f} %"),
        ]
    ),
    f"{ZEN3}/decode_step.json": Lines(
        [
            ("requests", "{requests}, {text_bytes} bytes of text"),
            ("ms per step, minimum (median)", "{wall_min_ms:.0f} ({wall_median_ms:.0f})"),
            ("transformers", "{transformers_wall_min_ms:.0f} ({transformers_wall_median_ms:.0f})"),
            ("ratio", "{of_the_least:.1f} ({of_the_medians:.1f})"),
            ("GB/s of weights", "{weights_gigabytes_per_second:.1f}"),
            ("machine reads", "26 to 35"),
        ]
    ),
    f"{AMX}/cpu_ratios.json": Lines(
        [
            ("instruction set", "{instruction_set}"), ("weights", "{weights}"), ("requests", "{requests}"),
            ("ms per step", "{wall_ms:.0f}"), ("transformers", "{transformers_wall_ms:.0f}"),
            ("ratio", "{wall_ratio:.2f}"),
        ]
    ),
    f"{ZEN3}/throughput.json": Across(
        "requests (`bench.throughput`, 60 bytes of text, median of 6 steps, other load on the machine)",
        "{requests}",
        [("ms per step", every, "{step_ms:.0f}"), ("requests x steps per second", every, "{frames_per_second:.1f}")],
    ),
    f"{ZEN3}/ragged.json": Lines(
        [
            ("24 ragged requests of 67 to 400 steps within 125 s (`bench.ragged`)", "{side}"),
            ("total", "{total_s:.0f} s"), ("steps of a request per second", "{steps_per_second:.3g}"),
            ("mean wait", "{mean_wait_s:.0f} s"),
        ]
    ),
    f"{ZEN3}/latency.json": Lines(
        [
            ("first sound (`bench.latency`, 0.86 s of sound in 91 steps, processor seconds, other load on the machine)",
             "{way}"),
            ("steps before it", "{steps_before}"), ("first sound", "{first_cpu_s:.1f}"), ("total", "{total_cpu_s:.1f}"),
        ]
    ),
    f"{ZEN3}/dropin.json": Lines(
        [("one call of 100 steps (`bench.dropin`, processor time)", "{side}"), ("seconds", "{median_s:.1f}")]
    ),
    f"{AVX512}/pages-32.json": Lines(
        [
            ("row", "{row}"), ("pages", "{pages}"), ("MB in pages", "{page_bytes:mega}"),
            ("process grew by, MB", "{grown_bytes:mega}"),
        ]
    ),
    f"{AVX512}/fleet.json": Lines(
        [
            ("listeners", "{listeners:,}"), ("requests", "{requests}"), ("GPUs", "{replicas:,.0f}"),
            ("batch in use", "{fill:.0%}"), ("first byte p50", "{first_p50:.3f} s"), ("p99", "{first_p99:.3f} s"),
        ]
    ),
    f"{AVX512}/serving_http.json": Facts(
        [
            ("streams that came to their end", "requests", "{finished}"),
            ("clients that left", "requests", "{left}"),
            ("hostile acts", "requests", "{hostile}"),
            ("requests of schemathesis", "requests", "{schemathesis}"),
            ("growth of memory in the second half", "memory, MB", "{growth a minute:.1f} MB a minute"),
            ("memory at the end", "memory, MB", "{last:.0f} MB"),
            ("sound made a second", "sound per second", "{value} s"),
            ("first byte, median; most of it in the queue", "first byte, seconds", "{p50:.0f} s"),
            ("processor seconds a request, 8 at a time", "server, seconds a request", "{cpu:.2f}"),
            ("the same, of the engine alone", "engine alone, seconds a request", "{cpu:.2f}"),
        ]
    ),
    f"{AVX512}/resident_memory.json": Lines(
        [
            ("weights", "`{weights}`"), ("torch imported, MB", "{imported_bytes:mega}"),
            ("model loaded", "{loaded_bytes:mega}"), ("most while loading", "{loading_peak_bytes:mega}"),
            ("most after 9 steps", "{peak_bytes:mega}"),
        ]
    ),
    f"{AVX512}/cpu_products.json": Across(
        "rows",
        "{rows}",
        [
            ("torch bf16", product("torch bf16", "cpu_products.json"), "{cpu_us:.0f}"),
            ("`fbgemm-fp16`", product("fbgemm-fp16", "cpu_products.json"), "{cpu_us:.0f}"),
            ("`onednn-bf16`", product("onednn-bf16", "cpu_products.json"), "{cpu_us:.0f}"),
            ("`fbgemm-int8`", product("fbgemm-int8", "cpu_products.json"), "{cpu_us:.0f}"),
            ("torch bf16, limited to AVX2", product("torch bf16", "cpu_products-avx2.json"), "{cpu_us:.0f}"),
            ("`fbgemm-fp16`, limited to AVX2", product("fbgemm-fp16", "cpu_products-avx2.json"), "{cpu_us:.0f}"),
        ],
    ),
}  # fmt: skip
"""By the first file of the mark; the results of further files follow its own."""


def pages() -> list[Path]:
    """Return the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """Return a page with its tables of figures made anew.

    Raises:
        InputError: For a file that is not there or not of the schema, or that `TABLES` does not know.
    """

    def made(found: re.Match[str]) -> str:
        files = [name.strip() for name in found["files"].split(",")]
        if files[0] not in TABLES:
            raise InputError(f"{files[0]}: bench.published does not know how to write it; add it to TABLES")
        results = [one | {"file": Path(name).name} for name in files for one in flat(read(FOLDER / name))]
        return found["mark"] + "\n".join(TABLES[files[0]].write(results)) + "\n"

    return PLACE.sub(made, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="published", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not current")
    options = parser.parse_args(arguments)
    old: list[str] = []
    wrong: list[str] = []
    try:
        for page in pages():
            text = page.read_text(encoding="utf-8")
            wrong += problems(page.name, text)
            if (new := written(text)) != text:
                old.append(page.name)
                if not options.check:
                    page.write_text(new, encoding="utf-8")
    except DiaFastError as error:
        print(f"published: {error}", file=sys.stderr)
        return 2
    if options.check and wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    if options.check and old:
        print(f"not current: {', '.join(old)}; run python -m bench.published", file=sys.stderr)
        return 1
    print(f"written: {', '.join(old)}" if old else "every table is current")
    return 0


class _Cells(Formatter):
    """Numbers in templates: `mega` writes millions, `short` three digits and no exponent."""

    def format_field(self, value: Any, spec: str) -> str:
        if spec == "mega":
            return f"{value / 1e6:.0f}"
        if spec == "short":
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return str(super().format_field(value, spec))


def _filled(template: str, result: Result) -> str:
    """Return a cell: empty where a figure is missing."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    if any(result.get(name) is None for name in names):
        return ""
    return _Cells().vformat(template, (), result)


def _head(heads: Sequence[str]) -> Iterator[str]:
    yield _line(heads)
    yield "|---|" + "---:|" * (len(heads) - 1)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
