"""A run that is killed and resumed ends with the same loss curve and the same bytes as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_fast.errors import InputError
from dia_fast.training import finetune
from dia_fast.training.run import Run
from tests.helpers.front import tree
from tests.training.corpus import given, log_of, make_home

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("resume"))


def train(home: Path, output: Path, resume: bool = False, **options: Any) -> Path:
    return finetune(output, {} if resume else given(home, **options), resume=resume, device="cpu", cache=home / "codes")


def process(home: Path, output: Path, *options: str) -> "subprocess.Popen[bytes]":
    """`dia-fast train` in a process of its own, which can be killed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "dia_fast", "train", "-o", str(output), "--codes", str(home / "codes"), *options]
    return subprocess.Popen(
        [*command, "--device", "cpu"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def as_options(options: dict[str, Any]) -> list[str]:
    data = str(options.pop("data"))
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return [data, *(name if value is True else f"{name}={value}" for name, value in named.items())]


def wait_for_line(running: "subprocess.Popen[bytes]", output: Path, lines: int) -> None:
    """Until the log has so many lines. Fails with what the process said if it ends before."""
    log = output / "log.jsonl"
    for _ in range(6000):
        if log.is_file() and log.read_bytes().count(b"\n") >= lines:
            return
        if running.poll() is not None:
            assert running.stderr is not None
            raise AssertionError(f"the run ended before line {lines}: {running.stderr.read().decode()}")
        time.sleep(0.01)
    raise AssertionError(f"no line {lines} after a minute")


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        ({"drop_codes": 0.3}, 1),
        pytest.param({"lora_rank": 4, "dtype": "bf16"}, 2, marks=pytest.mark.slow),
        pytest.param({"steps": 60, "save_every": 3, "recompute": True}, 5, marks=pytest.mark.slow),
    ],
    ids=["full, some codes replaced", "lora in bf16", "many times"],
)
def test_killed_and_resumed(options: dict[str, Any], kills: int, home: Path, tmp_path: Path) -> None:
    options = {"steps": 24, "save_every": 3, **options}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(home, undisturbed, **options)
    total = len(log_of(undisturbed))
    seed = random.SystemRandom().randrange(1 << 30)
    moments = sorted(random.Random(seed).sample(range(1, total - 8), kills))
    for count, moment in enumerate(moments):
        with process(home, killed, *(["--resume"] if count else as_options(given(home, **options)))) as running:
            wait_for_line(running, killed, moment)
            running.kill()
        assert running.returncode == -signal.SIGKILL and not (killed / "model").exists()
    train(home, killed, resume=True)
    assert log_of(killed) == log_of(undisturbed), f"killed at lines {moments}, seed {seed}"
    for folder in ("model", "adapter"):
        assert tree(killed / folder) == tree(undisturbed / folder), f"killed at lines {moments}, seed {seed}"
    assert [path.name for path in killed.glob("**/.*")] == []


def test_ctrl_c_saves_and_says_how_to_go_on(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with process(home, output, *as_options(given(home, steps=2000, save_every=2000))) as running:
        wait_for_line(running, output, 5)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        assert running.stderr is not None
        said = running.stderr.read().decode()
    step = Run.reopen(output, {}).last_step
    assert 3 <= step < 2000 and log_of(output)[-1]["step"] == step
    assert f"go on with: dia-fast train -o {output} --resume" in said and "interrupted" in said
    assert "Traceback" not in said


def test_a_log_ahead_of_its_state_and_cut_in_the_middle(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(home, tmp_path / "whole")
    output = tmp_path / "run"
    train(home, output)
    for path in output.glob("model/*"):
        path.unlink()
    (output / "model").rmdir()
    (output / "states" / "step-00000012.pt").unlink()
    (output / "states" / ".dia-fast-0123456789abcdef.part").write_bytes(b"half a state")
    log = (output / "log.jsonl").read_bytes()
    (output / "log.jsonl").write_bytes(log[:-20])
    monkeypatch.setattr("dia_fast.utils.files._swept", set())  # as in a new process
    train(home, output, resume=True)
    assert log_of(output) == log_of(tmp_path / "whole")
    assert tree(output / "model") == tree(tmp_path / "whole" / "model")
    assert sorted(path.name for path in (output / "states").iterdir()) == ["step-00000008.pt", "step-00000012.pt"]


def test_resuming_a_finished_run_changes_nothing(home: Path, tmp_path: Path) -> None:
    model = train(home, tmp_path / "run")
    before = tree(tmp_path / "run")
    assert train(home, tmp_path / "run", resume=True) == model
    assert tree(tmp_path / "run") == before


def interrupt(home: Path, output: Path, **options: Any) -> Path:
    """A run that stopped at step 5 of 12, its last state from step 4."""

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(output, given(home, **options), device="cpu", cache=home / "codes", report=stop)
    return output


@pytest.fixture
def interrupted(home: Path, tmp_path: Path) -> Path:
    return interrupt(home, tmp_path / "run")


def test_adapters_go_on_where_they_were(home: Path, tmp_path: Path) -> None:
    options = {"lora_rank": 4, "dtype": "bf16"}
    output = interrupt(home, tmp_path / "run", **options)
    train(home, output, resume=True)
    train(home, tmp_path / "whole", **options)
    assert log_of(output) == log_of(tmp_path / "whole")
    for folder in ("model", "adapter"):
        assert tree(output / folder) == tree(tmp_path / "whole" / folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 13}, "another steps: the run in .* was started with 12, now it is 13"),
        ({"learning_rate": 1.0}, "another learning_rate"),
        ({"dtype": "bf16"}, "another dtype: .* 'float32', now it is 'bfloat16'"),
        ({"lora_targets": ["qkv"]}, "another lora_targets"),
        ({"data": "elsewhere"}, "another data"),
        ({"nonsense": 1}, "unknown options: nonsense"),
    ],
)
def test_resuming_with_other_options(interrupted: Path, changed: dict[str, Any], message: str) -> None:
    before = tree(interrupted)
    with pytest.raises(InputError, match=message):
        finetune(interrupted, changed, resume=True, device="cpu")
    assert tree(interrupted) == before


def test_resuming_with_the_same_options_and_another_rhythm(home: Path, interrupted: Path, tmp_path: Path) -> None:
    finetune(interrupted, given(home, save_every=1, keep=1), resume=True, device="cpu", cache=home / "codes")
    train(home, tmp_path / "whole")
    assert tree(interrupted / "model") == tree(tmp_path / "whole" / "model")
    assert [path.name for path in (interrupted / "states").iterdir()] == ["step-00000012.pt"]


def test_resuming_with_other_data(home: Path, interrupted: Path, tmp_path: Path) -> None:
    transcript = home / "data" / "3.txt"
    text = transcript.read_text()
    try:
        transcript.write_text("[S1] Something else.")
        with pytest.raises(InputError, match="the data changed since the run in"):
            train(home, interrupted, resume=True)
    finally:
        transcript.write_text(text)


def test_a_damaged_state_and_a_damaged_run(home: Path, interrupted: Path) -> None:
    state = interrupted / "states" / "step-00000004.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match=r"step-00000004.pt is damaged .*delete it to go on from the state before it"):
        train(home, interrupted, resume=True)
    (interrupted / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json is damaged, the run cannot be resumed"):
        train(home, interrupted, resume=True)


def test_nothing_is_overwritten(home: Path, interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a run already, saved at step 4: go on with it by --resume"):
        train(home, interrupted)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(InputError, match="full exists and is not an empty folder"):
        train(home, tmp_path / "full")
    with pytest.raises(InputError, match="holds no run to resume: it has no run.json"):
        train(home, tmp_path / "full", resume=True)
