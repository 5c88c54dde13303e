"""Figures in sentences of the documentation: where each comes from.

`python -m bench.published --check` fails for a number with a unit that `SENTENCES` does not tell of. It names a file in
`bench/published` and how the figure is written from it, or says why the number was not measured. Tables with
`<!-- figures: FILE -->` and tables of numbers (`tests/bench/test_published.py`) are checked by themselves.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.tools.results import flat, read

FOLDER = Path(__file__).resolve().parent / "published"
_UNITS = r"ms|us|ns|s|[KMGT]B(?:/s)?|GHz|TFLOPS|%|times"
FIGURE = re.compile(rf"(?<![\w./-])-?\d[\d,.]*(?: (?:to|and|or) \d[\d,.]*)?(?: ?(?:{_UNITS})(?!\w)| x(?! ?\d)(?!\w))")
_LEFT_OUT = (
    r"^ *```.*?^ *```",  # code
    r"<!-- figures: [^\n]*\n(?:\|[^\n]*\n)+",  # tables that are written from files
    r"\|[^\n]*\n\|[-:| ]*---:[-:| ]*\|\n(?:\|[^\n]*\n)*",  # other tables of numbers
    r"<!--.*?-->",
    r"`[^`\n]*`",
)


@dataclass(frozen=True)
class Quote:
    """A figure from a file in `bench/published`.

    template: writes it from one result. where: entries that tell that result from the others.
    """

    file: str
    template: str
    where: Mapping[str, Any] = field(default_factory=dict)

    def written(self) -> str:
        """Return the figure as the file has it.

        Raises:
            InputError: If the file cannot be read.
            ValueError: If not exactly one result is meant.
        """
        found = [one for one in flat(read(FOLDER / self.file)) if self.where.items() <= one.items()]
        if len(found) != 1:
            raise ValueError(f"{self.file}: {len(found)} results are {dict(self.where)}, not one")
        return self.template.format(**found[0])


LIMIT = "a limit, a setting or a bound that tests hold, not a measurement"
GOAL = "a goal"
SIZES = "computed from sizes"
SHEET = "from a vendor's data sheet"
FOLLOWS = "follows from figures beside it, or is estimated from them, as the sentence says"
COUNTED = "counted by bench.traffic, the same to the byte on every machine: bench/traffic.json"
EVALUATED = "measured by make eval-voice, which writes it in the voice's own card"
ADVICE = "a recommendation"
ARITHMETIC = "arithmetic on random numbers, the same on every machine"

_H200, _EPYC = "2026-11-28-h200", "2026-11-29-amd-epyc"
_LAST = Quote(f"{_H200}/steps.json", "{step_ms:.2f} ms", {"step_ms": 0.992})
_BESIDE = {"requests": 1, "wall_min_ms": 1.1}
_TIMES = Quote(f"{_H200}/decode_step.json", "{of_the_least:.1f} times", _BESIDE)
_TRANSFORMERS = Quote(f"{_H200}/decode_step.json", "{transformers_wall_min_ms:.1f} ms", _BESIDE)


def _noted(template: str, of: str) -> Quote:
    return Quote(f"{_H200}/notes.json", template, {"of": of})


SENTENCES: Mapping[str, Mapping[str, Quote | str]] = {
    "README.md": {
        "18.2 ms": _TRANSFORMERS,
        "0.99 ms": _LAST,
        "59 %": Quote(f"{_H200}/steps.json", "{share_percent} %", {"step_ms": 0.992}),
        "85 %": GOAL,
        "1.00 ms": FOLLOWS,
    },
    "architecture.md": {"2.53 GB": SIZES},
    "batch.md": {
        "5 s": LIMIT,
        "15 s": LIMIT,
        "70 s": LIMIT,
        "0.99 times": Quote(f"{_EPYC}/ray_cost.json", "{ratio:.2f} times", {}),
    },
    "benchmarks.md": {
        "4.13 to 4.34 TB/s": _noted("{least:.2f} to {most:.2f} TB/s", "reading a buffer of 2 GiB"),
        "0.58 to 0.61 ms": FOLLOWS,
        "85 %": GOAL,
        "1.1 %": _noted("{percent} %", "five settings of the tuned config"),
        "1.00 ms": FOLLOWS,
        "1.150 ms": Quote(f"{_H200}/steps.json", "{step_ms:.3f} ms", {"step_ms": 1.15}),
        "1.1 ms": Quote(f"{_H200}/decode_step.json", "{wall_min_ms:.1f} ms", _BESIDE),
        "18.2 ms": _TRANSFORMERS,
        "16.6 times": _TIMES,
        "992 us": FOLLOWS,
        "25 us": FOLLOWS,
        "1.3 to 1.5 us": _noted("{least} to {most} us", "an empty launch with PDL"),
        "1.4 to 1.6 us": _noted("{least} to {most} us", "a barrier among 128 resident programs"),
        "1.151 ms": _noted("{with_ms} ms", "a step without PDL"),
        "1.0002 times": COUNTED,
        "1.0105 times": COUNTED,
        "1.13 times": COUNTED,
        "3 %": LIMIT,
        "2 %": LIMIT,
        "10 %": LIMIT,
        "1.7 times": LIMIT,
        "3.2 GB": SIZES,
        "36 s": LIMIT,
    },
    "command-line.md": {
        "26 ms": Quote(f"{_EPYC}/threads.json", "{step_ms} ms", {"threads": 1}),
        "81 ms": Quote(f"{_EPYC}/threads.json", "{step_ms} ms", {"threads": 2}),
        "6.4 GB": SIZES,
        "3.2 GB": SIZES,
    },
    "dia.md": {"2.529 GB": SIZES, "26 %": ARITHMETIC},
    "engine.md": {"0.74 s": SIZES},
    "kernel-checks.md": {"60 %": LIMIT, "40 KB": LIMIT},
    "kernels.md": {
        "0.755 ms": SIZES,
        "3.35 TB/s": SHEET,
        "12.6 MB": SIZES,
        "270 MB": SIZES,
        "4.1 MB": SIZES,
        "6.3 %": SIZES,
        "15 KB": SIZES,
        "40 KB": GOAL,
        "64 KB": SIZES,
        "32 KB": SIZES,
    },
    "long-form.md": {"64 KB": LIMIT, "20 s": LIMIT, "9 s": LIMIT, "12 s": LIMIT, "10 ms": LIMIT},
    "many-machines.md": {"88 KB/s": SIZES, "10 s": LIMIT, "99 %": LIMIT, "10 ms": LIMIT, "20 s": LIMIT},
    "server.md": {"30 s": LIMIT},
    "streaming.md": {"10 ms": LIMIT},
    "troubleshooting.md": {"20 s": ADVICE},
    "verified.md": {
        "0.99 ms": _LAST,
        "1.00 ms": FOLLOWS,
        "16.6 times": _TIMES,
        "1.10 ms": Quote(f"{_H200}/decode_step.json", "{wall_min_ms:.2f} ms", _BESIDE),
    },
    "voices.md": {"39 %": EVALUATED},
    "weights.md": {"97 %": LIMIT, "0.51 times": COUNTED, "0.64 times": COUNTED},
    "wrappers.md": {"0.25 to 4 times": LIMIT, "0.4 s": LIMIT, "0.7 s": LIMIT, "20 s": LIMIT, "10 to 20 s": LIMIT},
}
"""By page and figure, as the page writes it."""


def figures_in(text: str) -> list[str]:
    """Return the numbers with a unit in a page's sentences, in order."""
    for pattern in _LEFT_OUT:
        text = re.sub(pattern, " \n", text, flags=re.MULTILINE | re.DOTALL)
    return FIGURE.findall(re.sub(r"\s+", " ", text))


def problems(name: str, text: str) -> Iterator[str]:
    """Yield the figures of a page that nothing is told of, that are told otherwise, and that are not there any more."""
    known, found = SENTENCES.get(name, {}), figures_in(text)
    for figure in dict.fromkeys(found):
        source = known.get(figure)
        if source is None:
            yield f"{name}: {figure}: say in bench/quoted.py which file it is from, or why it was not measured"
        elif isinstance(source, Quote) and (written := source.written()) != figure:
            yield f"{name}: {figure}: {source.file} says {written}"
    for figure in known:
        if figure not in found:
            yield f"{name}: {figure} is not there: bench/quoted.py tells of it"
