"""Every code block of the README and of the site runs, with the demo voice in the place of the official weights.

Python blocks of a page are one program, shell blocks one session; both see a folder with a recording in it. A block
below `<!-- needs: ... -->` asks for what the tests do not have: it is compiled, or its options are checked.
"""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dia_fast import Audio, Dia, TextWarning, cli, demo_voice
from dia_fast.cli import app, info
from dia_fast.model.config import DiaConfig
from tests.server.serving import Server, serving

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NEEDS = (
    "a GPU", "a GPU and the official weights", "a minute", "a Triton compiler", "an audio player", "an object store"
)  # fmt: skip
OFFICIAL = "nari-labs/Dia-1.6B-0626"
FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    kind: str
    code: str
    needs: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["kind"], found["code"], found["needs"], text.count("\n", 0, found.start("code")) + 1)
        for found in FENCE.finditer(text)
    ]


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    with Dia.from_pretrained("demo") as dia:
        audio = dia.generate("[S1] Please open the red door.", seed=7)
    assert isinstance(audio, Audio)
    return audio.save(path)


@pytest.fixture
def folder(tmp_path: Path, recording: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voice.wav").write_bytes(recording.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


PYTHON = [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]
# Its program names weights of two libraries: tests/integrations has stand-ins for both.
PYTHON.remove(ROOT / "docs" / "migrating.md")


@pytest.mark.parametrize("page", PYTHON, ids=ids(PYTHON))
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    program: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.kind != "python":
            continue
        # Numbers of lines in a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.code.replace(OFFICIAL, str(demo_voice())), str(page), "exec")
        if block.needs is None:
            # The demo voice never learnt long scripts, and the page says so; nowhere else does an example warn.
            expected = "ignore" if page.name == "long-form.md" else "error"
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter(expected, TextWarning)
                exec(code, program)


@pytest.fixture(scope="module")
def ask_server() -> Iterator[Callable[[], Server]]:
    """A server with the demo voice, started by the first page that asks one."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(serving()))


SHELL = [page for page in PAGES if any(block.kind == "sh" for block in blocks(page))]


@pytest.mark.parametrize("page", SHELL, ids=ids(SHELL))
def test_shell_blocks_run(
    page: Path,
    folder: Path,
    ask_server: Callable[[], Server],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # voices that a page adds are not the user's
    printed, after = "", 0
    for block in blocks(page):
        if block.kind == "text" and printed and block.line == after:
            assert unmeasured(printed) == unmeasured(block.code), f"line {block.line}: not what the commands print"
        if block.kind == "sh":
            capfd.readouterr()
            for line in commands(block.code):
                if line.startswith("curl "):
                    ask(line.split(" | ")[0], ask_server(), folder)
                else:
                    run(line, folder, real=block.needs is None)
            # A text block one sentence below is what they print.
            printed, after = capfd.readouterr().out, block.line + block.code.count("\n") + 5


def unmeasured(printed: str) -> str:
    """Without seconds and what follows from them, which differ from run to run."""
    return re.sub(r"\d+\.\d+", "0.0", printed)


def ask(line: str, server: Server, folder: Path) -> None:
    """Run a curl command as it stands, with the server under test in the place of the reader's; it must succeed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = line.replace("http://127.0.0.1:8000", server.url).replace("curl ", "curl --fail-with-body ", 1)
    done = subprocess.run(["bash", "-euc", command], cwd=folder, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{line}: {done.stdout[-500:]!r}{done.stderr[-500:]!r}"
    assert not done.stdout or done.stdout[:4] == b"RIFF" or done.stdout[:1] in b"{[", f"{line}: {done.stdout[:50]!r}"


def commands(code: str) -> Iterator[str]:
    for line in code.replace("\\\n", " ").splitlines():
        if line.split("#")[0].strip():
            yield line.strip()


def run(line: str, folder: Path, *, real: bool) -> None:
    """Run one command, or check that what it names exists."""
    if line.startswith(("echo ", "mkdir ", "grep ")):
        subprocess.run(["bash", "-euc", line], cwd=folder, check=True, timeout=20)
        return
    words = shlex.split(line.split(" | ")[0] if not real else line, comments=True)
    assert "|" not in words and ">" not in words, f"mark what needs another program: {line}"
    match words:
        case ["dia-fast", "--help"]:
            assert "commands:" in app.build_parser().format_help()
        case ["dia-fast", "serve", *_]:
            app.build_parser().parse_args([word.replace(OFFICIAL, "demo") for word in words[1:]])
        case ["dia-fast", *rest]:
            arguments = [word.replace(OFFICIAL, "demo") for word in rest]
            if real:
                assert cli.main(arguments) == 0, line
            else:
                app.build_parser().parse_args(arguments)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        case ["pip", "install", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert what == "." or re.fullmatch(r"\.\[(\w+)\]", what)[1] in extras, line  # type: ignore[index]
        case ["python", "-m", module, *rest]:
            assert {word for word in rest if word.startswith("--") and word != "--"} <= options_of(module), line
        case ["git", "clone", *_] | ["cd", _] | [".venv/bin/pytest", *_]:
            pass
        case _:
            pytest.fail(f"{line}: no way to check this command")


def options_of(module: str) -> set[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        found = importlib.import_module(module)
        if not hasattr(found, "main"):  # a package that runs
            found = importlib.import_module(f"{module}.__main__")
        found.main(["--help"])
    assert ended.value.code == 0
    return set(re.findall(r"--[a-z-]+", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_blocks_say_what_they_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert text.count("\n```") == 2 * len(found), "a fence that is not closed, or not at the start of its line"
    for block in found:
        assert block.kind in ("python", "sh", "json", "text"), f"line {block.line}: {block.kind!r}"
        assert block.needs is None or block.needs in NEEDS, f"line {block.line}: {block.needs!r}"
    outside = FENCE.sub("", text)
    assert not re.search(r"^    (?:dia-fast|make|python|pip|from|import) ", outside, re.MULTILINE), "fence it"
    assert outside.count("<!-- needs") == 0, "a mark that stands before no block"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_in_sentences_exist(page: Path) -> None:
    """Options are checked in blocks; here that the module, target or command is there."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"`(?:python -m )?(bench\.\w+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or place.is_dir(), module
    for command in re.findall(r"`dia-fast ([a-z]+)", text):
        assert f"    {command} " in app.build_parser().format_help(), command


PLACE = re.compile(r"`((?:dia_fast|kernels|bench|tests|examples)/[\w/.-]*)`(?:: ((?:`[\w.]+`(?:, )?)+))?")


def defined(path: Path) -> set[str]:
    """Names that a module defines at its top, and those of its classes as `Class.name`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in names_of(node):
            found.add(name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{name}.{inner}" for part in node.body for inner in names_of(part)}
    return found


def names_of(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_places_in_the_code_exist(page: Path) -> None:
    """Files, and names in them, that a page sends its reader to are there."""
    for path, names in PLACE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if path.startswith("bench/results"):
            continue  # written by a command
        # The page on adding an op names the file that its reader is going to write.
        assert (ROOT / path).exists() or path.endswith("/relu_squared.py"), path
        missing = set(re.findall(r"[\w.]+", names)) - (defined(ROOT / path) if names else set())
        assert not missing, f"{path} does not define {sorted(missing)}"


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])


# Questions that a reader asks in these very words.
TITLES = {"What Dia computes", "How kernels are checked", "What has and has not been verified"}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_headings_name_their_subject(page: Path) -> None:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    assert headings
    opening = re.compile(r"(?:What|Whatever|Whether|Who|How)\b")
    assert not [heading for heading in headings if opening.match(heading) and heading not in TITLES]


def test_the_quickstart_names_every_extra_of_users() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`\w+`.*?) \|", text, re.MULTILINE)))
    assert set(extras) - {"bench", "dev", "docs", "voice"} <= set(named)


def test_the_table_of_memory_is_what_info_computes() -> None:
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)" + r" \| ([\d.]+) GB" * 4 + r" \|$", text, re.MULTILINE)
    assert len(rows) >= 4
    for count, *cells in rows:
        sizes = [(steps, size, weights) for weights in ("float", "int8") for steps, size in ((860, 200), (3072, 1024))]
        for shown, (steps, size, weights) in zip(cells, sizes, strict=True):
            needed = info.memory_needed(
                DiaConfig(), 2, batch=int(count), length=steps, text_length=size, weights=weights
            )
            assert f"{needed['total'] / 1e9:.1f}" == shown, (count, steps)


def test_the_table_of_memory_for_cloning_is_what_info_computes() -> None:
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) cloned" + r" \| ([\d.]+) GB" * 3 + r" \|$", text, re.MULTILINE)
    assert len(rows) >= 3
    for count, *cells in rows:
        for shown, weights in zip(cells, ("float", "int8-mlp", "int8"), strict=True):
            needed = info.memory_needed(DiaConfig(), 2, batch=int(count), length=1720, text_length=400, weights=weights)
            assert f"{needed['total'] / 1e9:.1f}" == shown, (count, weights)


def test_the_page_on_commands_names_every_command() -> None:
    named = re.findall(r"^\| `dia-fast (\w+)`", (ROOT / "docs" / "command-line.md").read_text(), re.MULTILINE)
    listed = re.findall(r"^    (\w+) {2,}", app.build_parser().format_help(), re.MULTILINE)
    assert named and named == listed


def test_the_page_on_versions_names_those_that_are_asked_for() -> None:
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = {row[1].strip().split(" ")[0]: row for line in text.splitlines() if len(row := line.split("|")) > 5}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("torch", "Triton", "transformers"):
        assert f'"{name.lower()}>={rows[name][2].strip()}' in project, name
        assert re.search(rf"^{name.lower()}=={re.escape(rows[name][3].strip())}\b", pinned, re.MULTILINE), name
    assert f'requires-python = ">={rows["Python"][2].strip()}"' in project


def test_the_readme_is_short_and_shows_pictures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 900
    pictures = re.findall(r'(?:src|srcset)="([^"]+\.png)"', text)
    assert len(pictures) >= 4 and all(name.rsplit("-", 1)[1] in ("light.png", "dark.png") for name in pictures)
    for name in pictures:
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG")
    [first, *_] = blocks(ROOT / "README.md")
    assert [line.split("#")[0].strip() for line in commands(first.code)] == ["make demo", "make test"]


def executed(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Run a notebook in a folder and return what its cells show."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (pip install '.[dev]')")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (pip install '.[dev]')")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "saved outputs; clear them"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output["output_type"] == "error" for output in shown)
    return shown


def test_the_quickstart_notebook_runs(folder: Path) -> None:
    shown = executed(ROOT / "examples" / "quickstart.ipynb", folder)
    assert any("<audio" in output.get("data", {}).get("text/html", "") for output in shown)


def test_the_notebook_of_figures_draws_published_results(tmp_path: Path) -> None:
    (tmp_path / "bench").symlink_to(ROOT / "bench")  # where it looks for results; it writes into its own folder
    shown = executed(ROOT / "examples" / "figures.ipynb", tmp_path)
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["ablation.pdf", "cpu.pdf", "step.pdf", "traffic.pdf"] and len(pictures) == len(drawn)
