"""Files in `deploy/`: what they name is there. No container is built here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dia_fast.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))


def options() -> set[str]:
    [commands] = [action for action in app.build_parser()._actions if action.dest == "command"]
    return {name for action in commands.choices["serve"]._actions for name in action.option_strings}  # type: ignore[index]


@pytest.mark.parametrize(
    "path", sorted(path for path in DEPLOY.iterdir() if path.is_file()), ids=lambda path: path.name
)
def test_the_environment_sets_options_that_exist(path: Path) -> None:
    named = set(re.findall(r"DIA_FAST_(\w+)", path.read_text(encoding="utf-8")))
    assert named and {f"--{name.lower().replace('_', '-')}" for name in named} <= options()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_containers_copy_what_the_package_is_made_of(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= set(sent), "the build is not given what it copies"
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in extras for extra in re.findall(r"\[([\w,]+)\]'", text)[0].split(","))
    assert 'ENTRYPOINT ["dia-fast", "serve"]' in text and "USER dia" in text


def test_compose_names_files_that_exist() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    assert all((ROOT / name).is_file() for name in re.findall(r"deploy/Dockerfile\.\w+", text))


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "dia-fast.service"
    text = (DEPLOY / "dia-fast.service").read_text(encoding="utf-8")
    unit.write_text(re.sub(r"(?<=ExecStart=)\S+", shutil.which("true") or "", text), encoding="utf-8")
    done = subprocess.run([verify, "verify", unit], capture_output=True, text=True)
    assert "dia-fast.service" not in done.stderr, done.stderr
