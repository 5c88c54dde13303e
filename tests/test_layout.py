"""The shape of the tree: which way imports point, how long functions get, what documents link to, how names read."""

import ast
import importlib.util
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import isa

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("bench", "dia_fast", "examples", "kernels", "tests")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".c", ".sh", ""}

LONGEST_FUNCTION = 60
LONGEST_KERNEL = 80  # a fused kernel reads best in one piece

# What a part of the tree must not import; the longest matching prefix of a module's name counts.
FORBIDDEN = {
    "dia_kernels": ("dia_fast", "bench", "tests"),
    "dia_fast": ("dia_fast.integrations", "dia_fast.server", "dia_fast.cli", "bench", "tests"),
    "dia_fast.integrations": ("dia_fast.cli", "bench", "tests"),
    "dia_fast.server": ("dia_fast.integrations", "dia_fast.cli", "bench", "tests"),
    "dia_fast.cli": ("bench", "tests"),
    "dia_fast.__main__": ("bench", "tests"),
    "dia_fast.run": ("dia_fast.cli", "bench", "tests"),
    "bench": ("tests",),
    "examples": ("dia_kernels", "bench", "tests"),
    "examples.single_kernels": ("bench", "tests"),
    "examples.own_glu": ("bench", "tests"),
}
# The torch references run where Triton cannot be installed.
FORBIDDEN["dia_kernels.reference"] = (*FORBIDDEN["dia_kernels"], "triton")
# Other people's implementations are what tests compare with, and what integrations serve.
GUESTS = ("transformers", "dac", "audiotools", "dia")


def python_files() -> list[Path]:
    return sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = parts[1:]
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def is_inside(module: str, package: str) -> bool:
    # `cli_speak` belongs to the command line as `cli` does.
    return module == package or module.startswith((package + ".", package + "_"))


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute name) of everything imported anywhere in a module, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    layer = max((name for name in FORBIDDEN if is_inside(module, name)), key=len, default=None)
    if layer is None:
        return []
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(ast.parse(source), module, is_package)
        if any(is_inside(name, package) for package in FORBIDDEN[layer])
    ]


def test_dependencies_point_one_way() -> None:
    found = []
    for path in python_files():
        found += forbidden_imports(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("dia_kernels.triton.rope", "from dia_fast.model.config import DiaConfig", False),
        ("dia_kernels.triton.rope", "import dia_kernels.launcher", True),
        ("dia_kernels.reference.linear", "import triton.language as tl", False),
        ("dia_kernels.triton.rope", "import triton", True),
        ("dia_fast.engine", "from dia_fast import cli", False),
        ("dia_fast.engine", "from .cli_speak import run", False),
        ("dia_fast.engine", "from . import integrations", False),
        ("dia_fast.engine", "def f():\n    import bench.tools.tiny_models", False),
        ("dia_fast.engine", "import dia_kernels", True),
        ("dia_fast.cli", "from dia_fast.engine import generate", True),
        ("dia_fast.cli_speak", "from dia_fast.cli import main", True),
        ("dia_fast.integrations.server", "from dia_fast import cli", False),
        ("bench.decode_step", "from tests.helpers import front", False),
        ("tests.bench.test_codegen", "from bench import codegen", True),
    ],
)
def test_the_import_check_itself(module: str, line: str, allowed: bool) -> None:
    assert (not forbidden_imports(line, module)) == allowed


def test_one_place_chooses_the_ops() -> None:
    """`choose_ops` tells what cannot be used as an InputError, which `get_ops`, free of dia_fast, does not."""
    found = [
        f"{module_name(path)}:{line}"
        for path in python_files()
        if is_inside(module := module_name(path), "dia_fast") and module != "dia_fast.model.device"
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
        if name == "dia_kernels.get_ops"
    ]
    assert not found, "\n".join(found)


def test_guests_are_imported_only_when_asked_for() -> None:
    """`import dia_fast` works on the base install: optional packages are imported inside functions."""
    found = []
    for path in python_files():
        module = module_name(path)
        if not module.startswith(("dia_fast", "dia_kernels", "examples")) or is_inside(module, "dia_fast.integrations"):
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = ast.Module(body=[node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
        for line, name in imports(top, module, path.name == "__init__.py"):
            if name.split(".")[0] in GUESTS:
                found.append(f"{module}:{line} imports {name}")
    assert not found, "\n".join(found)


# Folders of tests that mirror no folder of `dia_fast`; `demo_voice` mirrors that of `examples`.
OWN_FOLDERS = {"bench", "demo_voice", "helpers", "kernels", "parity"}


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    packages = {path.name for path in (ROOT / "dia_fast").iterdir() if path.is_dir()}
    assert folders - packages - OWN_FOLDERS == set()
    assert {path.stem for path in (ROOT / "tests").glob("test_*.py")} == {"test_api", "test_docs", "test_layout"}


def test_files_that_make_test_isa_names_exist() -> None:
    assert [name for name in isa.NUMERIC if not (ROOT / name).exists()] == []


LOOSE = 8  # modules that lie beside the rooms of a package


@pytest.mark.parametrize("package", ["dia_fast", "kernels/dia_kernels"])
def test_modules_lie_in_rooms(package: str) -> None:
    loose = sorted(path.name for path in (ROOT / package).glob("*.py"))
    assert len(loose) <= LOOSE, f"give these a folder: {loose}"


def test_folders_say_what_lives_there() -> None:
    """A namespace of names (`__getattr__`) or a docstring: nothing is anonymous."""
    for package in ("dia_fast", "kernels/dia_kernels"):
        for path in (ROOT / package).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.relative_to(ROOT)


def replaced_names(package: ModuleType) -> list[str]:
    """Public names of a package in whose place the import of a module, or of a folder of data, would put that."""
    lazy = hasattr(package, "__getattr__")
    found = []
    for name in getattr(package, "__all__", ()):
        spec = importlib.util.find_spec(f"{package.__name__}.{name}")
        # A name that exists when its package is imported was set after the import of the module of that name.
        if spec and (lazy or not spec.origin) and not isinstance(getattr(package, name), ModuleType):
            found.append(f"{package.__name__}.{name}")
    return found


def test_no_import_replaces_a_public_name() -> None:
    names = ["dia_fast", "dia_kernels"]
    for name in list(names):
        found = pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}.")
        names += [module.name for module in found if module.ispkg]
    assert [name for package in names for name in replaced_names(importlib.import_module(package))] == []


@pytest.mark.parametrize(
    ("file", "lazy", "replaced"),
    [
        ("voice/model.bin", True, True),
        ("voice/model.bin", False, True),
        ("voice.py", True, True),
        ("voice.py", False, False),
        ("a-voice/model.bin", True, False),
    ],
)
def test_the_check_of_replaced_names_itself(
    file: str, lazy: bool, replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted" / file).parent.mkdir(parents=True)
    (tmp_path / "planted" / file).touch()
    names = "def __getattr__(name):\n    return print\n" if lazy else "voice = print\n"
    (tmp_path / "planted" / "__init__.py").write_text(f"__all__ = ['voice']\n{names}")
    try:
        assert replaced_names(importlib.import_module("planted")) == (["planted.voice"] if replaced else [])
    finally:
        sys.modules.pop("planted")


def import_graph() -> dict[str, set[str]]:
    """Modules of the packages, and those that each imports when it is itself imported."""
    paths = {
        module_name(path): path for path in python_files() if path.parts[len(ROOT.parts)] in ("dia_fast", "kernels")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = ast.Module(body=[node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
        found = set()
        for _, name in imports(top, module, path.name == "__init__.py"):
            while name and name not in paths:
                name = name.rpartition(".")[0]
            found.add(name)
        # A package that gathers its modules is imported by them as a namespace only.
        graph[module] = {name for name in found - {"", module} if not is_inside(module, name)}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules, or an empty list."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for name in sorted(graph.get(module, ())):
            if found := walk(name, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_no_import_goes_in_a_circle() -> None:
    assert not circle(import_graph())


def test_the_circle_check_itself() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the end: long signatures and docstrings are welcome."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(source: str) -> list[tuple[int, str, int]]:
    """(line, name, lines of the body) of every function that is longer than it may be."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
            if body_lines(node) > (LONGEST_KERNEL if is_kernel else LONGEST_FUNCTION):
                found.append((node.lineno, node.name, body_lines(node)))
    return found


def test_functions_stay_short() -> None:
    long = []
    for path in python_files():
        for line, name, lines in long_functions(path.read_text(encoding="utf-8")):
            long.append(f"{path.relative_to(ROOT)}:{line} {name}: {lines} lines")
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("decorator", "lines", "allowed"), [("", 60, True), ("", 61, False), ("@triton.jit", 80, True)]
)
def test_the_length_check_itself(decorator: str, lines: int, allowed: bool) -> None:
    source = f'{decorator}\ndef f():\n    """Two\n    lines."""\n' + "    x = 1\n" * lines
    assert (not long_functions(source)) == allowed


def text_files() -> list[Path]:
    top = [path for path in ROOT.iterdir() if path.is_file()]
    folders = [ROOT / folder for folder in (*SOURCE_FOLDERS, ".ci", "docs")]
    below = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    skipped = {"__pycache__", "results", ".git"}
    return sorted(path for path in top + below if path.suffix in TEXT_SUFFIXES and not skipped & set(path.parts))


def test_no_paths_of_one_machine() -> None:
    names = "|".join(("work", "root", "home", "opt", "tmp", "mnt", "Users"))
    machine_path = re.compile(rf"(?<![\w.~$}})*/-])/(?:{names})/\w")
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if machine_path.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_links_between_documents_resolve() -> None:
    broken = []
    for path in text_files():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a document, as the site and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def test_links_to_headings_resolve() -> None:
    broken = []
    for path in text_files():
        if path.suffix != ".md":
            continue
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
            page = path.parent / target if target else path
            if page.suffix == ".md" and page.exists() and anchor not in anchors(page):
                broken.append(f"{path.relative_to(ROOT)}: {target}#{anchor}")
    assert not broken, "\n".join(broken)


def cited_documents(source: str) -> set[str]:
    """Documents that comments and docstrings send a reader to."""
    return set(re.findall(r"(?<![\w/.*{}-])((?:docs|bench|kernels|examples)/[\w/-]+\.md|[A-Z][A-Z_]+\.md)", source))


def test_code_cites_only_documents_that_are_here() -> None:
    found = []
    for path in python_files():
        if path == Path(__file__).resolve():
            continue
        for name in sorted(cited_documents(path.read_text(encoding="utf-8"))):
            # A bare name may be a file that the package writes or reads, where it lies beside the code.
            if not any((folder / name).is_file() for folder in (ROOT, path.parent)):
                found.append(f"{path.relative_to(ROOT)} cites {name}")
    assert not found, "\n".join(found)


def test_the_citation_check_itself() -> None:
    assert cited_documents('"""See docs/dia.md and DIA.md, not `*.md` or f"{name}.md"."""') == {"docs/dia.md", "DIA.md"}


def test_readme_names_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|^    |`)make ([a-z-]+)", text, re.MULTILINE))
        assert named, document
        assert named <= targets, f"{document} names {sorted(named - targets)}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_clean_leaves_what_took_long(tmp_path: Path) -> None:
    """Results, plots and 3.2 GB of weights have a target of their own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    long, short = (tmp_path / "bench/results", tmp_path / "examples/demo_voice/build"), (tmp_path / ".venv",)
    for folder in (*long, *short):
        folder.mkdir(parents=True)
    for target, left in (("clean", long), ("clean-results", ())):
        subprocess.run(["make", "-s", target], cwd=tmp_path, check=True, timeout=60)
        assert [folder for folder in (*long, *short) if folder.exists()] == [*left], target


def test_documents_agree_on_the_version() -> None:
    def found(pattern: str, name: str) -> tuple[str, ...]:
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert match, name
        return match.groups()

    version = found(r'^version = "([^"]+)"', "pyproject.toml")
    released = found(r"^## (\d[\w.]*) - (\d{4}-\d\d-\d\d)$", "CHANGELOG.md")
    assert version == found(r"^version: (\S+)$", "CITATION.cff") == released[:1]
    assert released[1:] == found(r"^date-released: (\S+)$", "CITATION.cff")


def test_packages_are_marked_as_typed() -> None:
    assert (ROOT / "dia_fast" / "py.typed").is_file()
    assert (ROOT / "kernels" / "dia_kernels" / "py.typed").is_file()


# A word that names must not hold, and the one that readers of the field know. Plurals count too.
SAY = {
    "anatomy": "ablation",
    "coming": "prefetch",
    "flying": "prefetch, or in_flight",
    "forced": "prompt_codes",
    "gauge": "metrics",
    "grid": "delayed_codes",
    "joint": "stream_parity",
    "lane": "batch_idx, or table_idx",
    "owner": "table_row, or Sequence",
    "packing": "fused_weights",
    "park": "swap_out",
    "parked": "swapped",
    "piece": "segment",
    "placement": "device",
    "prepack": "fused_weights, or cpu_weights",
    "reading": "segment, or script",
    "rule": "default_config",
    "setting": "params, options, or config",
    "settled": "kv_ready",
    "slot": "batch_idx, or slot_mapping",
}
# Where one of them has its usual meaning: a GPU's launch grid and lanes, the lines behind a plot, a token's slot in a
# page, as in `slot_mapping`.
USUAL = {
    "grid": ("dia_kernels", "dia_fast.diagnostics"),
    "lane": ("dia_kernels",),
    "slot": ("dia_kernels", "dia_fast.diagnostics.launches"),
}
# Names as a whole that stand for three things in a model with a batch, a block table and delayed codes.
VAGUE = {"row": "step, batch row or table_row", "rows": "delayed_codes, steps or batch rows", "run": "Sequence"}
VAGUE_IN = ("dia_fast.api", "dia_fast.engine", "dia_fast.generation", "dia_fast.jobs.items")
ROWS_OF_A_TABLE = {"dia_fast.engine.batch_rows"}


def words(name: str) -> set[str]:
    """The words of a name, in lower case and in the singular."""
    found = re.findall(r"[a-z]+|[A-Z][a-z]+|[A-Z]+(?![a-z])", name)
    return {word.lower() for word in found} | {word.lower().removesuffix("s") for word in found}


def names_of_class(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """(line, name) of the public methods, their parameters, the fields, and the attributes that methods set."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.lineno, item.target.id
    for item in ast.walk(node):
        is_set = isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
        if is_set and isinstance(item.value, ast.Name) and item.value.id == "self":
            yield item.lineno, item.attr
    yield from names_of(node.body, inside=True)


def names_of(body: list[ast.stmt], inside: bool = False) -> Iterator[tuple[int, str]]:
    """(line, name) of what statements make public; kernels count, whose parameters the launchers name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any(ast.unparse(item).startswith("triton.jit") for item in node.decorator_list)
            if is_kernel or not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                yield node.lineno, node.name
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                yield from ((item.lineno, item.arg) for item in every if item is not None)
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                yield node.lineno, node.name
                yield from names_of_class(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not inside:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((node.lineno, item.id) for item in targets if isinstance(item, ast.Name))


def unusual(source: str, module: str) -> list[str]:
    """The public names of a module that hold a word of the left column, and what to say."""
    found = []
    for line, name in [(1, module), *names_of(ast.parse(source).body)]:
        if name.startswith("_") and not name.startswith("__"):
            continue
        if name in VAGUE and module.startswith(VAGUE_IN) and module not in ROWS_OF_A_TABLE:
            found.append(f"{module}:{line} {name}: say {VAGUE[name]}")
        parts = words(name.replace("slot_mapping", ""))
        found += [
            f"{module}:{line} {name}: say {SAY[word]}"
            for word in sorted(SAY.keys() & parts)
            if not module.startswith(USUAL.get(word, ("-",)))
        ]
    return found


def test_public_names_use_the_words_of_the_field() -> None:
    found = []
    for path in python_files():
        module = module_name(path)
        if module.startswith(("dia_fast", "dia_kernels")):
            found += unusual(path.read_text(encoding="utf-8"), module)
        elif module.startswith("bench"):
            found += unusual("", module)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("dia_fast.engine.scheduler", "def park(sequence): ...", False),
        ("dia_fast.engine.scheduler", "def swap_out(sequence, *, lanes=3): ...", False),
        ("dia_fast.engine.scheduler", "def _park(lane): ...", True),
        ("dia_fast.engine.scheduler", "def submit(row): ...", False),
        ("dia_fast.checkpoint.layouts", "def cut(rows): ...", True),
        ("dia_fast.engine.metrics", "class Stats:\n    parked: int", False),
        ("dia_fast.engine.metrics", "class Stats:\n    def set(self):\n        self.forced_codes = 1", False),
        ("dia_fast.engine.metrics", "class Stats:\n    def set(self):\n        self._slots = slots = 1", True),
        ("dia_fast.training.options", "class TrainSettings: ...", False),
        ("dia_fast.text.segmentation", "PIECE_SECONDS = 12.0", False),
        ("dia_fast.model.packing", "", False),
        ("dia_fast.model.kv_cache", "def slot_mapping(table_row): ...", True),
        ("dia_kernels.triton.sample", "@triton.jit\ndef _sample(x_ptr, SETTLED: tl.constexpr): ...", False),
        ("dia_kernels.launcher", "def run(kernel, grid): ...", True),
        ("bench.anatomy", "", False),
    ],
)
def test_the_check_of_names_itself(module: str, source: str, allowed: bool) -> None:
    assert (not unusual(source, module)) == allowed


# A first line says what a thing is or does; these words ask instead.
ASKS = re.compile(r"(what|whatever|whether|who|whoever|whose|how|however|where|wherever|when|whenever|why)\b", re.I)


def asking(source: str) -> list[tuple[int, str]]:
    """(line, first line) of docstrings, those of variables among them, that begin with a question word."""
    return [
        (node.lineno, node.value.value.strip().splitlines()[0])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if ASKS.match(node.value.value.strip())
    ]


def test_docstrings_state_instead_of_asking() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for folder in (*SOURCE_FOLDERS, ".ci")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in asking(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_the_check_of_docstrings_itself() -> None:
    assert asking('"""What a caller may pass."""') == [(1, "What a caller may pass.")]
    assert asking('LIMIT = 3\n"""How many."""') == [(2, "How many.")]
    assert not asking('def f():\n    """Whole frames only."""')


def undocumented(item: object, name: str) -> list[str]:
    """Parameters of a public function, or of a class and its public methods, that its docstring does not list."""
    if inspect.isclass(item):
        members = [(f"{name}.{key}", member) for key, member in vars(item).items() if not key.startswith("_")]
        found = [line for key, member in members for line in undocumented(inspect.unwrap(plain(member)), key)]
        takes_any = issubclass(item, BaseException | Generator | AsyncGenerator)
        return found + ([] if takes_any else unlisted(item, item.__doc__ or "", name))
    return unlisted(item, item.__doc__ or "", name) if inspect.isfunction(item) else []


def plain(member: object) -> Any:
    """The function behind a class method or a static one."""
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


def unlisted(item: Any, text: str, name: str) -> list[str]:
    given = [key for key in inspect.signature(item).parameters if key not in ("self", "cls")]
    return [f"{name}: {key}" for key in given if not re.search(rf"^ +\*{{0,2}}{key}: \S", text, re.MULTILINE)]


def test_the_api_reference_tells_every_argument() -> None:
    names = re.findall(r"^::: (dia_fast[\w.]*)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 15
    found = [line for name in names for line in undocumented(pkgutil.resolve_name(name), name)]
    assert not found, "\n".join(found)
