"""The nodes for ComfyUI, loaded as it loads them, with its modules stood in for."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_fast import Dia
from tests.helpers.front import TEXT, make_codec, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, from a folder of custom nodes: under the name that ComfyUI gives it, a path without dots."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "wrappers" / "stand_ins"))
    place = tmp_path / "custom_nodes" / "dia_fast_nodes"
    shutil.copytree(ROOT / "examples" / "comfyui", place)
    name = str(place).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    for name in ("comfy", "comfy.utils"):
        sys.modules.pop(name, None)


def defaults(node: Any) -> dict[str, Any]:
    """The values that the node's widgets show at first."""
    given = node.INPUT_TYPES()["required"]
    return {name: item[1]["default"] for name, item in given.items() if len(item) > 1 and "default" in item[1]}


def test_every_node_is_as_comfyui_wants_it(nodes: Any) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        kinds = node.INPUT_TYPES()
        assert set(kinds) <= {"required", "optional"} and callable(getattr(node, node.FUNCTION)) and node.CATEGORY
        names = [name for part in kinds.values() for name in part]
        assert getattr(node, node.FUNCTION).__code__.co_varnames[1 : 1 + len(names)] == tuple(names)
        assert isinstance(node.RETURN_TYPES, tuple)


def test_a_workflow(nodes: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    make_codec(folder / "codec")
    [model] = nodes.DiaFastLoad().load("demo", "float32", str(folder))
    assert isinstance(model, Dia)
    given = defaults(nodes.DiaFastSpeak) | {"text": TEXT, "max_tokens": 60}
    [sound] = nodes.DiaFastSpeak().speak(model, **given)
    assert sound["waveform"].shape[:2] == (1, 1) and sound["sample_rate"] == 44_100
    [again] = nodes.DiaFastSpeak().speak(model, **given)
    assert torch.equal(sound["waveform"], again["waveform"])
    voice = {"waveform": 0.1 * torch.randn(1, 2, 11_025), "sample_rate": 22_050}
    [cloned] = nodes.DiaFastSpeak().speak(model, **given, voice=voice, voice_text="[S1] A voice.")
    assert cloned["waveform"].shape[-1] > 512
    with pytest.raises(ValueError, match="speed must be"):
        nodes.DiaFastSpeak().speak(model, **given | {"speed": 9.0})
