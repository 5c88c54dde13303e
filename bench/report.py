"""The folder that `bench.gpu` leaves behind: report.md for people, report.json for programs, and what parts wrote."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.parts import Part, Result
from bench.style import picture
from bench.suite import table
from bench.tools.results import flat
from dia_fast.errors import InputError
from dia_fast.utils.files import replacing

DOCTOR = "doctor.json"
PARITY = "parity.json"
SUITE = "suite/suite.json"
FIGURES = (
    "baseline.json", "candidates.json", "residency.json", "rows.json", "step.json", "throughput.json", "latency.json",
    "serving.json", "long_sound.json", "suite.json", "ablation.json", "ragged.json", "original.json",
)  # fmt: skip
# What they show, for those who do not see them, by their folder.
MEASURED = {
    "roofline": "operations per second of every kernel, under what the device itself reaches",
    "kernels": "time of every kernel on every backend",
    "latency": "time of a step over the context",
    "throughput": "frames per second over the number of requests",
}
PREDICTED = {
    "roofline": "predicted operations per second of every launch, under the published peaks",
    "kernels": "predicted time of a step by launch, beside the measured one",
    "latency": "predicted time of a step over the context, beside the measured one",
    "throughput": "predicted seconds of sound per second over the number of requests",
}
PLOTS = {"suite": MEASURED, "throughput": MEASURED, "plan": PREDICTED}


@dataclass
class Report:
    """Results so far. finished: every part was begun or skipped; interrupted: Ctrl-C came before that."""

    folder: Path
    parts: Sequence[Part]
    environment: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    interrupted: bool = False

    def begin(self) -> None:
        """Make the folder. Raises InputError if something is in it that an earlier report did not put there."""
        try:
            if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "report.json").exists():
                raise InputError(f"{self.folder.name} is not empty and holds no report; name another folder with --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            # What an earlier run found is not found by this one.
            for file in (DOCTOR, PARITY, *FIGURES, "report.md", *(path.name for path in self.folder.glob("*.log"))):
                (self.folder / file).unlink(missing_ok=True)
            for name in PLOTS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder.name}: {error.strerror}") from error
        self._put("environment.json", json.dumps(self.environment, indent=1))

    def status(self) -> int:
        """Return the exit status: 0 only if all that can run here ran, something did, and nothing is wrong."""
        if self.interrupted:
            return 130
        bad = any(result.status not in ("ok", "skipped") for result in self.results)
        return int(bad or all(result.status == "skipped" for result in self.results) or bool(self.wrong()))

    def wrong(self) -> list[str]:
        """Return the results that are not as they should be, a sentence each."""
        return list(dict.fromkeys(self._wrong()))

    def distrusted(self) -> list[str]:
        """Ops that doctor found wrong, and "model" if the model is: the suite gives no time for them."""
        ops = [v["op"] for v in self._read(DOCTOR, {}).get("kernels", ()) if v["outcome"] in ("wrong", "failed")]
        return ops + (["model"] if self.wrong() else [])

    def _wrong(self) -> Iterator[str]:
        for verdict in self._read(DOCTOR, {}).get("kernels", ()):
            if verdict["outcome"] in ("wrong", "failed"):
                yield f"doctor: {verdict['op']} {verdict['outcome']}: {verdict['detail']}"
        for finding in flat(self._read(PARITY, {"results": []})):
            if finding["outcome"] in ("wrong", "failed"):
                yield f"parity: {finding['dtype']} {finding['what']}: {finding['detail']}"
        for item in self._read(SUITE, {}).get("verdicts", ()):
            if item["outcome"] == "wrong" and item["backend"] == "triton":
                yield f"suite: {item['group']}: {item['detail']}"

    def _read(self, name: str, otherwise: Any) -> Any:
        """Return a file that a part wrote; a part that broke off may have left none, or half of one."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return otherwise

    def write(self) -> None:
        """Write report.json and report.md as things stand."""
        self._put("report.json", json.dumps(self.as_dict(), indent=1))
        self._put("report.md", self.markdown())

    def as_dict(self) -> dict[str, Any]:
        return {
            "finished": self.finished,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "wrong": self.wrong(),
            "environment": self.environment,
            "parts": [asdict(result) for result in self.results],
        }

    def markdown(self) -> str:
        lines = ["# dia-fast on " + str(self.environment["device"]), "", *self._state(), "", "## Parts", ""]
        lines += ["| part | shows | result | seconds |", "|---|---|---|---:|"]
        shows = {part.name: part.shows for part in self.parts}
        for result in self.results:
            said = result.status + (f": {result.reason}" if result.reason else "")
            lines.append(f"| {result.name} | {shows[result.name]} | {said} | {result.seconds:.0f} |")
        suite = self._read(SUITE, None)
        if suite is not None:
            lines += ["", "## Kernels and stages", "", table.markdown(suite)]
        lines += self._pictures()
        speeds = {part.name for part in self.parts if part.speed}
        for result in self.results:
            if result.status in ("ok", "skipped", "not run") and result.name not in speeds:
                continue
            if result.tail:
                lines += ["", f"## {result.name}", "", "```", result.tail, "```"]
        lines += ["", "## Environment", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.environment.items()]
        return "\n".join(lines) + "\n"

    def _state(self) -> list[str]:
        wrong = self.wrong()
        lines = []
        if wrong:
            lines += ["**Wrong results on this machine; no speed is given for what they touch:**", ""]
            lines += [f"- {item}" for item in wrong] + [""]
        unsure = [r.name for r in self.results if r.name in ("tests", "doctor", "parity") and r.status != "ok"]
        if unsure and not wrong:
            lines += [f"**Not shown to be right: {' and '.join(unsure)} did not come to an end.**", ""]
        if self.interrupted:
            lines.append(f"**Interrupted after {self.seconds:.0f} s: this report is a part of one.**")
        elif not self.finished:
            lines.append(f"Unfinished; written after {self.seconds:.0f} s.")
        else:
            lines.append(f"Finished after {self.seconds:.0f} s.")
        return lines

    def _pictures(self) -> list[str]:
        found = []
        for folder, shown in PLOTS.items():
            for file in sorted((self.folder / folder).glob("*-light.svg")):
                name = file.name.removesuffix("-light.svg")
                found += ["", picture(name, shown.get(name, name), folder)]
        return found

    def _put(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(text)
