"""Every example and every block of the guide is run, as a user would: in a process of its own, offline."""

from pathlib import Path

import pytest

from tests.integrations import hub
from tests.test_docs import blocks

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the examples find their tiny checkpoint."""
    from examples import tiny

    folder = tmp_path_factory.mktemp("made")
    tiny.make(folder)
    return folder


@pytest.mark.parametrize("side", [[], ["--before"]], ids=["after", "before"])
@pytest.mark.parametrize("program", ["generate", "clone", "train"])
def test_with_transformers(program: str, side: list[str], made: Path) -> None:
    command = ["-m", "examples.with_transformers", program, "--tiny", "--out", str(made), *side]
    text = hub.run(command, made, ROOT).stdout
    assert {"generate": "61 rows", "clone": "105 of them the voice's", "train": "loss 7.4"}[program] in text


@pytest.mark.parametrize("program", ["simple", "batch", "clone"])
def test_with_original(program: str, made: Path) -> None:
    hub.run(["-m", "examples.with_original", program, "--tiny", "--out", str(made)], made, ROOT)
    written = {"simple": "simple.wav", "batch": "simple_2.wav", "clone": "voice_clone.wav"}[program]
    assert (made / written).stat().st_size > 1000


def test_single_kernels(tmp_path: Path) -> None:
    text = hub.run(["-m", "examples.single_kernels", "--backend", "aot_eager"], tmp_path, ROOT).stdout
    from dia_kernels import torch_library as library

    ops = {name for name in vars(library) if hasattr(getattr(library, name), "_opoverload")}
    shown = {line.split()[0] for line in text.splitlines()[1:]}
    assert shown == ops, "an example for every operator"
    assert text.count("compiled whole") == len(ops)


def test_the_guide(tmp_path: Path) -> None:
    """The blocks of docs/migrating.md in their order, in one program, with stand-ins under the official names."""
    cache = hub.make_hub(tmp_path / "hub")
    found = blocks(ROOT / "docs" / "migrating.md")
    program = "\n".join(block.code for block in found if block.kind == "python" and block.needs is None)
    assert program.count("accelerate(") >= 2 and "original.install()" in program
    # The official weights end a speech by themselves; these do so late.
    program = program.replace("max_new_tokens=3072", "max_new_tokens=60").replace("max_tokens=3072", "max_tokens=60")
    (tmp_path / "guide.py").write_text(program)
    hub.run(["-W", "ignore", "guide.py"], cache, tmp_path)
    for name in ("before.wav", "after.wav", "cloned.wav", "original.wav"):
        assert (tmp_path / name).stat().st_size > 500, name
