"""The gate by which regressions are found: its rules, its file, and what it says of figures made up."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import baseline, check, metrics
from bench.baseline import Group, Kind
from bench.tools import results
from dia_fast.errors import InputError

KIND = Kind("bytes", "lower", 0.1, 1.0, "made up")
SOUND = Group(
    {"moved": KIND, "lead": Kind("ratio", "higher", 0.2, 0.0, "made up")},
    {"first": {"moved": 100.0}, "second": {"moved": 0.0, "lead": 5.0}},
)


def gate(tmp_path: Path, recorded: Group, now: Group | Exception, *options: str, group: str = "traffic") -> int:
    """Records one group and checks the other against it; the exit status."""
    file = tmp_path / "baseline.json"
    baseline.write(file, {group: recorded})

    def measure(name: str, folder: Path) -> Group:
        assert name == group and folder.is_dir()
        if isinstance(now, Exception):
            raise now
        return now

    return check.main(["--only", group, "--baseline", str(file), *options], measure)


def changed(subject: str, kind: str, value: float, group: Group = SOUND) -> Group:
    """The group with one figure set."""
    return replace(group, values={**group.values, subject: {**group.values.get(subject, {}), kind: value}})


@pytest.mark.parametrize(
    ("subject", "kind", "value", "status", "verdict"),
    [
        ("first", "moved", 111.0, 0, "noise"),
        ("first", "moved", 112.0, 1, "WORSE"),
        ("first", "moved", 88.0, 0, "better"),
        ("first", "moved", math.inf, 1, "WORSE"),
        ("first", "moved", math.nan, 1, "WORSE"),
        ("second", "moved", 1.0, 0, "noise"),
        ("second", "moved", 2.0, 1, "WORSE"),
        ("second", "lead", 4.0, 0, "noise"),
        ("second", "lead", 3.9, 1, "WORSE"),
        ("second", "lead", 6.1, 0, "better"),
        ("second", "lead", math.nan, 1, "WORSE"),
        ("third", "moved", 0.0, 1, "NEW"),
    ],
)
def test_a_figure_is_judged_by_its_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], subject: str, kind: str, value: float, status: int, verdict: str
) -> None:
    assert gate(tmp_path, SOUND, changed(subject, kind, value)) == status
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith(f"traffic: {subject}, {kind}")]
    assert line.endswith(verdict)
    assert ("If this is meant: python -m bench.check --update" in printed) == (status == 1)
    assert ("Better than recorded" in printed) == (verdict == "better")


def test_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, SOUND, SOUND) == 0
    assert capsys.readouterr().out.split("\n", 1)[1] == "traffic: 3 figures: 3 as recorded\n"
    assert gate(tmp_path, SOUND, SOUND, "--all") == 0
    assert "second, lead" in capsys.readouterr().out


def test_a_figure_that_is_gone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, SOUND, replace(SOUND, values={"first": {"moved": 100.0}})) == 1
    assert "2 MISSING" in capsys.readouterr().out


def test_another_version_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded, now = (replace(SOUND, versions={"triton": number}) for number in ("3.7.1", "3.9.0"))
    assert gate(tmp_path, recorded, now) == 2
    assert "traffic: recorded with triton 3.7.1, here 3.9.0; install what was recorded" in capsys.readouterr().out


def test_on_another_machine_nothing_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded, now = (replace(SOUND, machine={"processor": name}) for name in ("old", "new"))
    assert gate(tmp_path, recorded, changed("first", "moved", 1e9, now)) == 0
    printed = capsys.readouterr().out
    assert "processor old, here new: shown, not judged" in printed and "3 not judged" in printed


def test_a_figure_in_another_unit_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = replace(SOUND, kinds={**SOUND.kinds, "moved": replace(KIND, unit="lines")})
    assert gate(tmp_path, SOUND, now) == 2
    assert "'moved' was recorded in bytes (lower is better) and is now in lines" in capsys.readouterr().out


def test_a_group_that_cannot_be_measured_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, SOUND, InputError("traffic: no luck")) == 2
    assert "traffic: no luck" in capsys.readouterr().out


def test_a_group_that_is_not_recorded_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baseline.json"
    baseline.write(file, {})
    assert check.main(["--only", "traffic", "--baseline", str(file)], lambda *_: SOUND) == 2
    assert f"traffic: not in {file}; record it with python -m bench.check --update" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "no baseline of format 1"),
        ('{"format": 2}', "no baseline of format 1"),
        ('{"format": 1, "traffic": 3}', "is damaged"),
        ('{"format": 1, "traffic": {"kinds": {}}}', "is damaged (KeyError: 'values')"),
        ('{"format": 1, "traffic": {"kinds": {"a": {"unit": "b"}}}}', "is damaged (TypeError"),
        (("better", '"lower"', '"up"'), "better is 'up'"),
        (("share", "0.1", "-0.1"), "share and amount are -0.1"),
        (("moved", "100.0", '"many"'), "first: moved is 'many', not a finite number"),
        (("moved", "100.0", "NaN"), "first: moved is nan, not a finite number"),
        (("first", '"first": {"moved"', '"first": {"weight"'), "'weight' is none of the kinds moved, lead"),
    ],
)
def test_a_broken_baseline_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Any, message: str
) -> None:
    file = tmp_path / "baseline.json"
    baseline.write(file, {"traffic": SOUND})
    if text is None:
        file.unlink()
    elif isinstance(text, str):
        file.write_text(text)
    else:
        _, old, new = text
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new, 1))
    assert check.main(["--only", "traffic", "--baseline", str(file)], lambda *_: SOUND) == 2
    said = capsys.readouterr().err
    assert message in said and str(file) in said and "--update" in said


NUMBERS = st.floats(-1e12, 1e12)
KINDS = st.builds(Kind, st.text(), st.sampled_from(baseline.BETTER), st.floats(0, 2), st.floats(0, 1e9), st.text())


@given(KINDS, NUMBERS, NUMBERS)
def test_both_directions_mirror_each_other(kind: Kind, recorded: float, now: float) -> None:
    other = replace(kind, better="higher" if kind.better == "lower" else "lower")
    verdict = kind.verdict(recorded, now)
    assert verdict == other.verdict(-recorded, -now)
    swapped = {"WORSE": "better", "better": "WORSE"}
    assert other.verdict(recorded, now) == swapped.get(verdict, verdict)


@given(st.dictionaries(st.text(), st.tuples(KINDS, NUMBERS)), st.dictionaries(st.text(), st.text()))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, figures: dict[str, tuple[Kind, float]], facts: dict[str, str]
) -> None:
    values = {"all": {name: value for name, (_, value) in figures.items()}}
    group = Group({name: kind for name, (kind, _) in figures.items()}, values, facts, facts)
    file = tmp_path_factory.mktemp("round") / "baseline.json"
    baseline.write(file, {"a": group, "b": SOUND})
    assert baseline.read(file) == {"a": group, "b": SOUND}


def test_what_varies_is_measured_again_before_it_is_called_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "baseline.json"
    baseline.write(file, {"memory": SOUND})
    nan = math.nan
    for values, status in (
        ((150.0, 100.0, 101.0), 0), ((150.0, 100.0, 160.0), 1), ((105.0,), 0), ((nan, nan, nan), 1),
    ):  # fmt: skip
        left = list(values)
        found = check.main(
            ["--only", "memory", "--baseline", str(file)], lambda *_, left=left: changed("first", "moved", left.pop(0))
        )
        assert (found, left) == (status, [])
    assert gate(tmp_path, SOUND, changed("first", "moved", 150.0)) == 1, "what is counted is measured once"


def test_update_records_and_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baseline.json"
    options = ["--update", "--only", "traffic", "--baseline", str(file)]
    baseline.write(file, {"memory": SOUND})
    assert check.main(options, lambda *_: SOUND) == 0
    assert capsys.readouterr().out == "traffic: 3 figures recorded for the first time\n"
    assert check.main(options, lambda *_: SOUND) == 0
    assert capsys.readouterr().out == "traffic: nothing changed\n"
    now = replace(changed("first", "moved", 1234567.0), versions={"triton": "3.9.0"})
    assert check.main(options, lambda *_: now) == 0
    said = capsys.readouterr().out
    assert "first, moved: 100 -> 1,234,567" in said and "triton none, here 3.9.0" in said
    assert baseline.read(file) == {"traffic": now, "memory": SOUND}


def test_update_takes_noise_from_repeated_runs(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    left = [100.0, 90.0, 100.0, 107.0, 101.0]
    options = ["--update", "--only", "memory", "--baseline", str(file)]
    assert check.main(options, lambda *_: changed("first", "moved", left.pop(0))) == 0
    group = baseline.read(file)["memory"]
    assert group.values["first"]["moved"] == 100.0
    assert group.kinds["moved"].share == pytest.approx(0.19)  # 2 x 10 is 19 and the amount of 1
    assert group.kinds["moved"].source == "made up; at least twice the largest deviation of 5 runs, 10.0%"
    assert group.kinds["lead"] == SOUND.kinds["lead"]  # no deviation: what the kind says


def test_update_does_not_lose_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baseline.json"
    file.write_text("{")
    assert check.main(["--update", "--only", "traffic", "--baseline", str(file)], lambda *_: SOUND) == 2
    assert "is not JSON" in capsys.readouterr().err and file.read_text() == "{"
    assert check.main(["--update", "--baseline", str(file)], lambda *_: SOUND) == 0
    assert set(baseline.read(file)) == set(metrics.GROUPS) - {"ratio"}


@pytest.mark.parametrize("isa", metrics.BARS)
@pytest.mark.parametrize(("single", "status"), [(9.0, 0), (0.91, 0), (0.89, 1)])
def test_a_lead_is_judged_by_the_bar_of_the_instruction_set(
    isa: str, single: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(metrics, "instruction_set", lambda: isa)
    [bars] = metrics.required().values()
    leads = (single * metrics.BARS[isa][1] if isa != "other" else single), 40.0
    values = {f"requests: {count}": {"times transformers": lead} for count, lead in zip((1, 4), leads, strict=True)}
    status = 0 if isa == "other" else status
    assert gate(tmp_path, SOUND, replace(bars, values=values), group="ratio") == status
    said = capsys.readouterr().out
    assert ("bench/metrics.py" in said) == bool(status) and "--update" not in said


def test_bars_are_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baseline.json"
    assert check.main(["--update", "--only", "ratio", "--baseline", str(file)], lambda *_: SOUND) == 2
    assert "bench/metrics.py" in capsys.readouterr().err and not file.exists()


def test_the_report_holds_every_figure(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert gate(tmp_path, SOUND, changed("first", "moved", 500.0), "--json", str(report)) == 1
    told = results.read(report)
    assert told["status"] == 1 and len(told["results"]) == 3
    expected = {"group": "traffic", "recorded": 100.0, "now": 500.0, "verdict": "WORSE"}
    assert expected.items() <= results.flat(told)[0].items()


@pytest.mark.parametrize("names", ["speed", "traffic,speed", ","])
def test_unknown_groups_are_refused(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--only", names])
    assert "choose from launches,traffic,codegen,memory,ratio" in capsys.readouterr().err


def test_a_process_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(InputError, match=r"(?s)launches: .* ended with 3:\n  no such luck"):
        metrics.in_a_process("launches", tmp_path)


def test_a_table_of_the_user_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way, with a process of its own: what is committed holds, and the environment does not matter."""
    monkeypatch.setenv("DIA_KERNELS_TABLE", "no/such/table.json")
    assert check.main(["--only", "launches"]) == 0
    assert "launches: 4 figures: 4 as recorded" in capsys.readouterr().out


def test_the_same_subject_twice_gets_a_number() -> None:
    taken: list[str] = []
    for _ in range(3):
        taken.append(metrics.unused("linear", taken))
    assert taken == ["linear", "linear (2)", "linear (3)"]
    assert metrics.unused("linear (x)", taken) == "linear (x)"


def test_the_committed_baseline_is_whole() -> None:
    recorded = baseline.read(check.BASELINE)
    assert list(recorded) == [name for name in metrics.GROUPS if name not in metrics.required()]
    for group in recorded.values():
        assert group.values and all(kind.source for kind in group.kinds.values())
