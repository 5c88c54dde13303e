"""Copies of the original package in other programs: found by what they define, under whatever name."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dia_fast.run
from dia_fast.errors import InputError
from dia_fast.integrations import original
from dia_fast.integrations.original import Dia, copies
from dia_fast.model.config import DiaConfig
from tests.integrations import hub

EARLY = """
import nothing_that_is_installed

class Dia:
    def __init__(self, config, device=torch.device("cuda")): ...

    @classmethod
    def from_local(cls, config_path, checkpoint_path, device=torch.device("cuda")): ...

    @classmethod
    def from_pretrained(cls, model_name="nari-labs/Dia-1.6B", device=torch.device("cuda")): ...

    def _load_dac_model(self): ...

    def generate(self, text, max_tokens=None, cfg_scale=3.0, temperature=1.3, top_p=0.95, use_cfg_filter=True,
                 use_torch_compile=True, cfg_filter_top_k=100, audio_prompt_path=None, mood="calm"): ...
"""
LATE = """
from .state import STATE

SAMPLED = "by the original: " + STATE

class Dia:
    def __init__(self, config, compute_dtype="float32", device=None, load_dac=True): ...

    def _load_dac_model(self): ...

    def generate(self, text: str | list[str], seed: int = 42, verbose=True):
        return outputs
"""


@pytest.fixture(autouse=True)
def imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder in front of the path, and none of its modules left behind."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(sys.modules)
    yield
    original.uninstall()
    for name in set(sys.modules) - set(before):
        if not name.startswith(("dia_fast", "torch", "numpy", "soundfile")):
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


NAMES = ["box.third_party.dia.dia.model", "node.dia_lib.model", "node.src.model", "voices.dia", "park.dia.model"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_found_by_what_it_defines(tmp_path: Path, name: str) -> None:
    path = Path(*name.split("."))
    write(tmp_path, {f"{parent}/__init__.py": "" for parent in list(path.parents)[:-1]} | {f"{path}.py": EARLY})
    with pytest.raises(ImportError):  # its own
        __import__(name)
    original.install()
    __import__(name)
    module = sys.modules[name]
    assert issubclass(module.Dia, Dia) and module.Dia.__module__ == name and module.ComputeDtype.FLOAT16
    original.uninstall()
    assert name not in sys.modules


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"shop/__init__.py": "", "shop/model.py": "class Dia:\n    def generate(self): return 1\n",
                     "shop/media.py": "class Dia: pass", "port/model.py": "import math\nfrom flax import nnx\n" + LATE,
                     "broken/model.py": EARLY + "(("})  # fmt: skip
    original.install()
    from shop.media import Dia as media  # type: ignore[import-not-found]
    from shop.model import Dia as other  # type: ignore[import-not-found]

    assert other().generate() == 1 and not issubclass(media, Dia)
    with pytest.raises(SyntaxError):
        import broken.model  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="flax"):  # its own: a port to another library is left alone
        import port.model  # type: ignore[import-not-found]  # noqa: F401
    original.uninstall()
    original.install(discover=False)
    write(tmp_path, {"late/model.py": LATE, "late/state.py": "STATE = 'yes'"})
    from late.model import Dia as theirs  # type: ignore[import-not-found]

    assert not issubclass(theirs, Dia)


def test_names_that_are_given_are_replaced_whatever_they_hold(tmp_path: Path) -> None:
    write(tmp_path, {"shop/__init__.py": "", "shop/speech.py": "class Dia: pass\nRATE = 3\n"})
    original.install(also=["shop.speech", "shop.nowhere"])
    from shop.nowhere import Dia as made  # type: ignore[import-not-found]
    from shop.speech import RATE  # type: ignore[import-not-found]
    from shop.speech import Dia as found

    assert found is made is Dia and RATE == 3
    for wrong in ("shop.speech", ["shop speech"], [3]):
        with pytest.raises(InputError, match="also must be"):
            original.install(also=wrong)  # type: ignore[arg-type]


def test_an_installed_package_stays_whole_but_for_its_model(tmp_path: Path) -> None:
    write(tmp_path, {
        "dia/__init__.py": "from .model import Dia\n", "dia/model.py": LATE, "dia/state.py": "STATE = 'whole'\n",
        "dia/config.py": "class DiaConfig: pass\nclass DecoderConfig: pass\nclass DataConfig: pass\n",
        "dia/layers.py": "from .config import DecoderConfig\nfrom .state import STATE\n",
        "dia/audio.py": "from .config import DataConfig\n",
    })  # fmt: skip
    original.install()
    import dia.audio  # type: ignore[import-not-found]
    import dia.layers  # type: ignore[import-not-found]
    from dia.config import DataConfig  # type: ignore[import-not-found]
    from dia.model import SAMPLED  # type: ignore[import-not-found]

    assert dia.audio.DataConfig is DataConfig and dia.layers.STATE == "whole" and SAMPLED == "by the original: whole"
    assert issubclass(dia.Dia, Dia) and dia.Dia is dia.model.Dia
    with pytest.raises(AttributeError):
        dia.model.nothing  # noqa: B018


def test_what_was_imported_before_is_told_of(tmp_path: Path) -> None:
    write(tmp_path, {"box/__init__.py": "", "box/model.py": LATE, "box/state.py": "STATE = ''",
                     "server.py": "from box.model import Dia\n"})  # fmt: skip
    import box.model  # type: ignore[import-not-found]
    import server  # type: ignore[import-not-found]

    before = box.model
    with pytest.warns(UserWarning, match=r"box\.model was imported before install\(\).*by server is still"):
        original.install()
    assert issubclass(box.model.Dia, Dia) and not issubclass(server.Dia, Dia)
    original.uninstall()
    assert sys.modules["box.model"] is box.model is before


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.make_hub(tmp_path_factory.mktemp("hub"))


def test_a_copy_takes_arguments_in_its_own_order_with_its_own_defaults(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, object] = {}
    monkeypatch.setattr(Dia, "generate", lambda self, **options: heard.update(options))
    node = copies.class_of(EARLY.encode())
    assert node is not None
    early = copies.alike(node, "early.model")
    dia = early.from_pretrained(str(cache / "model"), torch.device("cpu"), dac_model=cache / "codec")
    assert isinstance(dia, early) and dia.device.type == "cpu" and dia.compute_dtype is torch.float32
    dia.generate("a", 60)
    assert heard == {"text": "a", "max_tokens": 60, "cfg_scale": 3.0, "temperature": 1.3, "top_p": 0.95,
                     "use_torch_compile": True, "cfg_filter_top_k": 100}  # fmt: skip
    heard.clear()
    with pytest.warns(UserWarning, match="mood of a fork"):
        dia.generate("a", 60, 1.0, 1.0, 0.9, False, audio_prompt_path="b.wav", mood="glad")
    assert heard["cfg_filter_top_k"] is None and heard["audio_prompt"] == "b.wav" and "mood" not in heard
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dia.generate("a", mood="glad")  # once is enough
    for wrong in ({"args": ("a",) * 11}, {"args": ("a",), "text": "b"}):
        with pytest.raises(TypeError):
            dia.generate(*wrong.pop("args"), **wrong)


def test_a_copy_that_returns_lists_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dia, "generate", lambda self, text, **_: list(text) if len(text) > 1 else "one")
    late = LATE.replace("return outputs", "return outputs if len(outputs) > 1 else outputs[0]")
    for source, wanted in ((LATE, ["one"]), (late, "one"), (EARLY, "one")):
        node = copies.class_of(source.encode())
        assert node is not None
        dia = copies.alike(node, "some.model")(DiaConfig(), device="cpu")
        assert dia.generate("a") == wanted and dia.generate(["a", "b"]) == ["a", "b"]


PROGRAM = """
import json, sys
from box.model import Dia
print(json.dumps([sys.argv[1:], __name__, Dia.__mro__[1].__module__, sys.path[0]]))
"""


@pytest.mark.parametrize("module", [False, True])
def test_a_program_runs_without_an_edit(tmp_path: Path, module: bool) -> None:
    write(tmp_path, {"box/__init__.py": "", "box/model.py": EARLY, "server.py": PROGRAM})
    what = ["-m", "server"] if module else ["server.py"]
    done = hub.run(["-m", "dia_fast.run", *what, "--port", "3", "-m"], tmp_path, tmp_path)
    assert json.loads(done.stdout) == [
        ["--port", "3", "-m"], "__main__", "dia_fast.integrations.original.model", str(tmp_path)
    ]  # fmt: skip


def test_programs_that_cannot_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dia_fast.run.main([str(tmp_path / "nowhere.py")]) == 2
    assert "no such script" in capsys.readouterr().err
    assert dia_fast.run.main(["--also", "a b", "x.py"]) == 2
    assert subprocess.run([sys.executable, "-m", "dia_fast.run"], capture_output=True).returncode == 2


def test_quirks_of_a_whole_program() -> None:
    made = [Dia(DiaConfig(), device="cpu").quirks]
    original.install(quirks=True)
    made += [Dia(DiaConfig(), device="cpu").quirks, Dia(DiaConfig(), device="cpu", quirks=False).quirks]
    original.uninstall()
    assert [*made, Dia(DiaConfig(), device="cpu").quirks] == [False, True, False, False]
