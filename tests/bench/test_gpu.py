"""The report of `make bench-gpu` without a GPU: parts that fail, hang, crash, are wrong, or are interrupted."""

import argparse
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import environment, gpu, parts
from bench.parts import Part, Runner
from bench.report import FIGURES, PARITY, Report
from dia_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "a device", "torch": "2"}
WRONG = {"kernels": [{"op": "glu", "outcome": "wrong", "detail": "error 7 times what is allowed"}]}


def python(name: str, code: str, limit: float = 30.0, **more: Any) -> Part:
    return Part(name, ("-c", code), limit, f"shows {name}", **more)


def report_of(folder: Path, given: Sequence[Part], budget: float = 100.0) -> tuple[int, dict[str, Any], str]:
    """Run parts; return the exit status, report.json and report.md."""
    report = Report(folder, given, FACTS)
    report.begin()
    status = gpu.run(given, report, budget)
    return status, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {part["name"]: part["status"] for part in found["parts"]}


def test_parts_that_fail_hang_or_crash_are_recorded_and_the_others_run(tmp_path: Path) -> None:
    given = [
        python("fails", "print('last words'); raise SystemExit(3)"),
        python("hangs", "import time; print('began'); time.sleep(60)", limit=2.0),
        python("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Part("lacks", ("-c", "raise SystemExit(1)"), 9, "needs what is not there", needs=("no_such_package",)),
        python("works", "print('fine')"),
    ]
    status, found, text = report_of(tmp_path, given)
    assert status == 1 and found["finished"] and not found["interrupted"]
    assert statuses(found) == {
        "fails": "failed", "hangs": "timed out", "crashes": "failed", "lacks": "skipped", "works": "ok",
    }  # fmt: skip
    reasons = {part["name"]: part["reason"] for part in found["parts"]}
    assert reasons["fails"] == "ended with status 3" and "SIGSEGV" in reasons["crashes"]
    assert reasons["hangs"] == "was ended after 2 s" and reasons["lacks"] == "no_such_package is not installed"
    assert found["parts"][0]["tail"] == "last words" and found["parts"][1]["tail"].startswith("began")
    assert "| hangs | shows hangs | timed out: was ended after 2 s |" in text and "last words" in text
    assert (tmp_path / "works.log").read_text() == "fine\n"


def test_all_well_is_status_0(tmp_path: Path) -> None:
    status, found, text = report_of(tmp_path, [python("works", "pass")])
    assert status == 0 and found["finished"] and "Finished after" in text


def test_a_part_that_does_not_want_to_end_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GRACE", 0.3)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid)\ntime.sleep(60)"
    )
    _, found, _ = report_of(tmp_path, [python("stubborn", code, limit=2.0)])
    assert statuses(found) == {"stubborn": "timed out"}
    child = int(found["parts"][0]["tail"])
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("what the part had started still runs")


def test_a_part_that_is_begun_gets_no_more_time_than_is_left(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 30.0
        return now[0]

    runner = Runner(tmp_path, 55.0, clock)  # 30 s at the start, 60 at the first part, 90 when it has ended
    first, second = (runner.run(python(name, "pass")) for name in ("first", "second"))
    assert (first.status, second.status) == ("ok", "no time")
    assert "time for the report was over" in second.reason


def test_parts_without_time_make_the_status_1(tmp_path: Path) -> None:
    status, found, _ = report_of(tmp_path, [python("late", "pass")], budget=1.0)
    assert status == 1 and statuses(found) == {"late": "no time"}


def test_wrong_results_are_reported_instead_of_speeds(tmp_path: Path) -> None:
    given = [
        python("doctor", f"print({json.dumps(json.dumps(WRONG))}); raise SystemExit(1)", output="doctor.json"),
        python("suite", "import sys; print(sys.argv[1:])"),
        python("step", "print('3 ms per step')", speed=True),
        python("tests", "print('others go on')"),
    ]
    status, found, text = report_of(tmp_path, given)
    assert status == 1
    assert statuses(found) == {"doctor": "failed", "suite": "ok", "step": "left out", "tests": "ok"}
    assert found["wrong"] == ["doctor: glu wrong: error 7 times what is allowed"]
    assert "Wrong results on this machine" in text and "3 ms per step" not in text
    # The suite is told, and gives no time for what is wrong.
    assert (tmp_path / "suite.log").read_text() == "['--distrust', 'glu', 'model']\n"


def test_a_wrong_kernel_in_the_suite_stops_the_speeds_of_the_model(tmp_path: Path) -> None:
    verdict = {"group": "glu-tokens-2", "backend": "triton", "outcome": "wrong", "detail": "glu: error inf"}
    run = {"benchmarks": [], "machine_info": {}, "verdicts": [verdict], "complete": True}
    (tmp_path / "run").write_text(json.dumps(run))
    code = (
        f"import pathlib; folder = pathlib.Path({str(tmp_path)!r}); (folder / 'out' / 'suite').mkdir(); "
        "(folder / 'run').rename(folder / 'out' / 'suite' / 'suite.json'); raise SystemExit(1)"
    )
    given = [python("suite", code), python("latency", "print('2 ms')", speed=True)]
    _, found, text = report_of(tmp_path / "out", given)
    assert statuses(found) == {"suite": "failed", "latency": "left out"}
    assert "| glu-tokens-2 |" in text and "**wrong**" in text and "2 ms" not in text


def test_parts_that_were_left_out_are_not_called_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full disk: there are no weights, and no speed is measured."""
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    weights = Part("weights", ("-m", "bench.make_checkpoint", str(tmp_path / "weights")), 9, "makes weights")
    step = Part("step", ("-c", "print('3 ms')", "--model", "weights"), 9, "shows step", speed=True)
    given = [python("suite", "pass"), weights, step]
    status, found, text = report_of(tmp_path / "out", given)
    assert status == 1 and statuses(found) == {"suite": "ok", "weights": "left out", "step": "left out"}
    assert "| step | shows step | left out: there are no weights |" in text and "has no 4 GB free" in text


def test_a_report_of_nothing_is_status_1(tmp_path: Path) -> None:
    status, found, _ = report_of(tmp_path, [python("lacks", "pass", needs=("no_such_package",))])
    assert status == 1 and statuses(found) == {"lacks": "skipped"}


def test_a_check_that_did_not_end_is_said_and_speeds_are_measured(tmp_path: Path) -> None:
    given = [python("parity", "raise SystemExit(1)"), python("step", "print('3 ms per step')", speed=True)]
    _, found, text = report_of(tmp_path, given)
    assert statuses(found) == {"parity": "failed", "step": "ok"}
    assert "Not shown to be right: parity" in text and "3 ms per step" in text


def test_a_report_names_no_machine(tmp_path: Path) -> None:
    code = (
        "import os, socket, sys, tempfile; print(os.getcwd(), socket.gethostname(), sys.prefix, tempfile.gettempdir())"
    )
    _, found, text = report_of(tmp_path, [python("tells", code + "; raise SystemExit(1)")])
    private = (socket.gethostname(), str(ROOT), str(Path.home()), sys.prefix, str(tmp_path))
    everything = text + json.dumps(found) + (tmp_path / "tells.log").read_text()
    assert not [name for name in private if len(name) > 3 and name in everything]
    facts = json.dumps(environment.collect(torch.device("cpu")))
    assert socket.gethostname() not in facts and "torch" in facts


def test_a_report_names_no_folder_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the files that parts write by themselves, whatever JSON makes of a path; keys stay what they are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(socket, "gethostname", lambda: "detail")
    out, scratch, model = (tmp_path / name for name in ("Öffentlich", "scratch", "model"))
    for folder in (out, scratch, model, tmp_path / "temporary"):
        folder.mkdir()
    (out / "report.json").write_text("{}")
    code = (
        f"import json, pathlib; folders = {[str(out), str(scratch / 'x'), str(model)]!r}\n"
        "print(*folders, 'on detail')\n"
        "out = pathlib.Path(folders[0]); (out / 'suite').mkdir(); (out / 'own.json').write_text(json.dumps(folders))\n"
        "(out / 'suite' / 'own.csv').write_text(','.join(folders)); (out / 'half.json').write_text(folders[0] + '{')"
    )
    wrong = f"print({json.dumps(json.dumps(WRONG))}); raise SystemExit(1)"
    given = [python("tells", code), python("doctor", wrong, output="doctor.json")]
    options = gpu.build_parser().parse_args(["--scratch", str(scratch), "--model", str(model)])
    report = Report(out, given, FACTS)
    report.begin()
    gpu.run(given, report, 100.0, gpu.hidden_folders(options, scratch / "x"))
    assert (out / "tells.log").read_text() == "<report> <scratch> <model> on <host>\n"
    assert json.loads((out / "own.json").read_text()) == ["<report>", "<scratch>", "<model>"]
    assert (out / "suite" / "own.csv").read_text() == "<report>,<scratch>,<model>"
    everything = "".join(file.read_text() for file in out.rglob("*.*") if file.is_file())
    assert str(tmp_path) not in everything and "\\u00d6" not in everything
    assert report.wrong() == ["doctor: glu wrong: error 7 times what is allowed"], "the host is called as a key is"


def test_pictures_of_predictions_are_called_that(tmp_path: Path) -> None:
    code = (
        f"import pathlib; folder = pathlib.Path({str(tmp_path / 'out')!r})\n"
        "for name in ('suite', 'plan'):\n"
        "    (folder / name).mkdir(); (folder / name / 'latency-light.svg').touch()"
    )
    _, _, text = report_of(tmp_path / "out", [python("draws", code)])
    assert 'alt="time of a step over the context"' in text and 'alt="predicted time of a step over the' in text


def test_a_model_is_found_from_the_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run in the root of the repository."""
    seen: list[str] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(gpu, "all_parts", lambda options, folder, weights: seen.append(options.model) or [])
    monkeypatch.setattr(gpu, "environment", lambda device: FACTS)
    gpu.main(["--out", "out", "--model", "model"])
    gpu.main(["--out", "out", "--model", "somebody/dia"])
    assert seen == [str(tmp_path / "model"), "somebody/dia"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "environment", lambda device: FACTS)
    (tmp_path / "file").write_text("mine")
    assert gpu.main(["--out", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert (tmp_path / "file").read_text() == "mine"


DRIVER = """
import sys
from bench import gpu
from bench.parts import Part
code = "import pathlib, time; pathlib.Path({mark!r}).touch(); print('began', flush=True); time.sleep(60)"
gpu.environment = lambda device: {{"device": "a device"}}
gpu.all_parts = lambda options, folder, weights: [
    Part("quick", ("-c", "print('done')"), 30, "something quick"),
    Part("slow", ("-c", code), 60, "something slow"),
    Part("never", ("-c", "pass"), 60, "nothing"),
]
sys.exit(gpu.main(["--out", {out!r}, "--scratch", {scratch!r}]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_report_is_readable_and_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    out, scratch, mark = tmp_path / "out", tmp_path / "scratch", tmp_path / "mark"
    scratch.mkdir()
    code = DRIVER.format(mark=str(mark), out=str(out), scratch=str(scratch))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == 130
    found, text = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert found["interrupted"] and not found["finished"]
    assert statuses(found) == {"quick": "ok", "slow": "interrupted", "never": "not run"}
    assert "Interrupted after" in text and found["parts"][1]["tail"].startswith("began")
    assert not list(scratch.iterdir())
    assert {path.name for path in out.iterdir()} == {
        "environment.json", "report.json", "report.md", "quick.log", "slow.log",
    }  # fmt: skip


def test_half_written_files_of_ended_parts_are_removed(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / '.0123.part')!r}, 'w').write('half'); import os; os.kill(os.getpid(), 9)"
    report_of(tmp_path, [python("dies", code)])
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no report"):
        Report(tmp_path, [], FACTS).begin()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_without_a_gpu_it_says_so_and_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "torch" in capsys.readouterr().err and not (tmp_path / "out").exists()


def all_parts(*given: str) -> list[Part]:
    options = gpu.build_parser().parse_args(["--device", "cpu", *given])
    return gpu.all_parts(options, Path("out"), Path("weights"))


class Parsed(Exception):
    pass


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_every_part_names_options_that_its_command_knows(
    quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, given_parts = argparse.ArgumentParser.parse_args, all_parts(*quick)

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for part in given_parts:
        _, module, *arguments = part.command
        if module != "pytest":
            name = {"bench.suite": "bench.suite.__main__", "dia_fast": "dia_fast.cli"}.get(module, module)
            with pytest.raises(Parsed):
                importlib.import_module(name).main(arguments)


def test_only_names_parts_and_gets_what_they_need() -> None:
    names = [part.name for part in gpu.chosen_parts(all_parts(), ["latency", "doctor"])]
    assert names == ["doctor", "weights", "latency"]
    assert [part.name for part in gpu.chosen_parts(all_parts("--model", "m"), ["latency"])] == ["latency"]
    with pytest.raises(InputError, match="there is no part 'speed'; there are tests, doctor, baseline"):
        gpu.chosen_parts(all_parts(), ["speed"])


def test_the_order_is_that_of_worth_and_checks_come_before_the_speeds_they_vouch_for() -> None:
    names = [part.name for part in all_parts()]
    assert names[:4] == ["tests", "doctor", "baseline", "candidates"]
    assert names.index("parity") < names.index("rows") < names.index("weights") < names.index("step")
    assert [part.name for part in gpu.chosen_parts(all_parts(), ["rows"])] == ["rows"], "it makes weights of its own"


def test_a_part_whose_program_is_missing_is_skipped(tmp_path: Path) -> None:
    status, found, _ = report_of(tmp_path, [python("checks", "pass", programs=("no-such-program",))])
    assert status == 1 and found["parts"][0]["reason"] == "no-such-program is not installed"
    _, found, _ = report_of(tmp_path, [python("checks", "pass", programs=("sh",))])
    assert statuses(found) == {"checks": "ok"}


PROBE = """
import torch
from bench import residency
from dia_kernels import aot
with aot.compiling("sm_90") as compiled:
    residency.chain(torch.empty(11, 132, 3, dtype=torch.int64, device="meta"), 132, 4)
assert len(compiled) == 1 + residency.CHAIN
for item in compiled:
    text = item.asm["ptx"]
    start, wait = text.index("%globaltimer"), text.index("griddepcontrol.wait")
    assert start < text.index("griddepcontrol.launch_dependents") < wait < text.rindex("%globaltimer")
"""


def test_the_probe_of_residency_reads_the_clock_on_both_sides_of_the_wait() -> None:
    pytest.importorskip("triton", reason="the probe is a Triton kernel")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_launches_are_ahead_if_they_start_before_the_first_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the probe is a Triton kernel")
    from bench import residency

    def capture(launch: Any) -> Any:
        return lambda: None

    times = torch.zeros(1 + residency.CHAIN, 2, 3, dtype=torch.int64)
    times[0, :, 2] = torch.tensor([9_000, 10_000])
    times[1:, :, 0] = 12_000
    times[1:4, :, 0] = 4_000
    times[3, 1, 0] = 11_000  # one of its programs starts late
    monkeypatch.setattr(torch, "zeros", lambda *shape, **named: times)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = residency.measure(2, 4, torch.device("cpu"), capture)
    assert found["ahead"] == 2 and found["starts_us"][0] == (-6.0, -6.0) and found["starts_us"][2] == (-6.0, 1.0)


def test_the_environment_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no checkout")
    assert done.stdout.startswith(environment.commit().rstrip("+")) and len(environment.commit()) >= 12
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == ""


@pytest.mark.parametrize("before", [None, "mine.json"])
def test_each_table_is_timed_by_itself_and_the_default_after_it(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="steps are timed on the kernels")
    from bench import ablation

    monkeypatch.delenv("DIA_KERNELS_TABLE", raising=False)
    if before:
        monkeypatch.setenv("DIA_KERNELS_TABLE", before)
    seen: list[str | None] = []

    def seconds() -> float:
        seen.append(os.environ.get("DIA_KERNELS_TABLE"))
        return float(len(seen))

    tables = [tmp_path / "one.json", tmp_path / "two.json"]
    found = list(ablation._under(tables, seconds))
    assert found == [("one", 1.0), ("default again", 2.0), ("two", 3.0), ("default again", 4.0)]
    assert seen == [str(tables[0]), before, str(tables[1]), before] and os.environ.get("DIA_KERNELS_TABLE") == before


@pytest.mark.slow
def test_the_whole_report_on_a_tiny_model_and_a_cpu(tmp_path: Path) -> None:
    """Every part runs; those that need a GPU say what is missing."""
    from tests.helpers.front import make_model

    model = make_model(tmp_path / "model")
    given = ["--device", "cpu", "--quick", "--model", str(model), "--out", str(tmp_path / "out")]
    os.environ.pop("TRITON_INTERPRET", None)
    gpu.main([*given, "--only", "suite", "step", "throughput", "latency", "ragged"])
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    tails = {part["name"]: part["tail"] for part in found["parts"]}
    ended = statuses(found)
    # On so small a model transformers may be faster, which these two report by their exit status.
    for name in ("step", "ragged"):
        assert ended.pop(name) in ("ok", "failed") and "times transformers'" in tails[name], tails[name]
    assert ended == dict.fromkeys(["suite", "throughput", "latency"], "ok"), found


def test_every_file_of_a_part_is_removed_before_the_next_run_and_every_speed_waits_for_the_checks() -> None:
    given = all_parts()
    files = {
        Path(part.command[part.command.index("--json") + 1]).name for part in given if "--json" in part.command[:-1]
    }
    assert files == {*FIGURES, PARITY}
    # The suite is told what is wrong; residency times launches that compute nothing.
    assert {part.name for part in given if not part.speed} == {
        "tests", "doctor", "residency", "parity", "weights", "sanitizer", "suite",
    }  # fmt: skip


def test_the_documentation_lists_the_parts_in_their_order() -> None:
    listed = [f"| `{part.name}` | {part.shows} |" for part in all_parts()]
    assert "\n".join(listed) in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
