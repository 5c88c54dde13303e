"""Build sdist and wheel, install the wheel into clean environments, and speak there.

    python .ci/package_test.py [--fast]

The wheel is built from the sdist, so a file that the sdist lacks is missed. Environments are made for the
oldest and the newest supported Python that this machine has; what the wheel depends on is installed from the index.
`--fast` makes one environment, of the running Python, that borrows the installed packages.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = "[S1] Please open the red door. [S2] Yes, thank you."


def interpreters() -> dict[tuple[int, int], str]:
    """Every supported Python that runs here, by version."""
    found: dict[tuple[int, int], str] = {}
    for minor in range(10, 20):
        candidates = [shutil.which(f"python3.{minor}")]
        if "PYENV_ROOT" in os.environ or (Path.home() / ".pyenv").is_dir():
            root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
            candidates += [str(path) for path in sorted(root.glob(f"versions/3.{minor}.*/bin/python"))]
        for python in filter(None, candidates):
            run = subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True)
            if run.returncode == 0:
                found[3, minor] = python
                break
    return found


def build(folder: Path) -> Path:
    """The wheel, from the sdist, both looked into."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "dia_fast/api.py"} <= names, sorted(names)[:50]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        assert "Project-URL: Documentation" in archive.read(metadata).decode()
    for needed in (
        "dia_fast/py.typed",
        "dia_fast/demo-voice/model.safetensors",
        "dia_fast/server/page/index.html",
        "dia_kernels/py.typed",
        "dia_kernels/configs/sm_90.json",
    ):
        assert needed in names, f"the wheel lacks {needed}"
    extra = {name.split("/")[0] for name in names} - {"dia_fast", "dia_kernels", metadata.split("/")[0]}
    assert not extra, f"the wheel holds {sorted(extra)}"
    for path in (sdist, wheel):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return wheel


def try_out(python: str, wheel: Path, folder: Path, *, borrow: bool) -> None:
    """Install the wheel for one Python and let it speak, in an empty folder, without the repository in sight."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    run(python, "-m", "venv", folder / "venv")
    here = folder / "venv" / "bin" / "python"
    if borrow:
        # Folders in a .pth file are searched, and .pth files in them are not read: the editable install stays unseen.
        [packages] = (folder / "venv").glob("lib/python*/site-packages")
        libraries = [path for path in sys.path if path.endswith("-packages")]
        (packages / "borrowed.pth").write_text("\n".join(libraries) + "\n")
        run(here, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    else:
        constraints = folder / "constraints.txt"
        constraints.write_text((ROOT / "constraints.txt").read_text())
        environment["HOME"] = os.environ.get("HOME", str(folder))  # pip's cache and settings
        run(here, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, wheel)
        environment["HOME"] = str(folder)
    place = run(here, "-c", "import dia_fast, dia_kernels; print(dia_fast.__file__, dia_fast.__version__)")
    assert str(folder / "venv") in place, f"imported from elsewhere: {place}"
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and place.split()[-1] == version[1], place
    command = folder / "venv" / "bin" / "dia-fast"
    said = run(command, "speak", TEXT, "--seed", "7", "-o", "out.wav")
    size = (folder / "out.wav").stat().st_size
    assert size > 20_000, said
    print(f"{run(here, '--version').strip()}: installed, and spoke {size / 1e3:.0f} kB of sound", flush=True)
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one environment, with borrowed dependencies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        if options.fast:
            try_out(sys.executable, wheel, Path(scratch) / "borrowed", borrow=True)
            return 0
        found = interpreters()
        for version in sorted({min(found), max(found)}):
            try_out(found[version], wheel, Path(scratch) / f"3.{version[1]}", borrow=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
