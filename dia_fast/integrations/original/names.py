"""`from dia.model import Dia`, in a program that was written for the original package, finds ours."""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from dia_fast.integrations.original import config, model

_NAMES = ("dia", "dia.model", "dia.config")
_before: dict[str, ModuleType | None] | None = None


def install() -> None:
    """Makes `dia`, `dia.model` and `dia.config` resolve to dia-fast, in this process, until `uninstall`.

    Other modules of an installed original package stay within reach. What was imported from it before stays what it is.
    """
    global _before
    if _before is not None:
        return
    there = sys.modules.get("dia") or _find("dia")
    places = getattr(there, "__path__", None) or getattr(there, "submodule_search_locations", None)
    package = _module("dia", Dia=model.Dia)
    package.__path__ = list(places or [])
    ours = {
        "dia": package,
        "dia.model": _module(
            "dia.model",
            Dia=model.Dia,
            ComputeDtype=config.ComputeDtype,
            DEFAULT_SAMPLE_RATE=model.DEFAULT_SAMPLE_RATE,
            SAMPLE_RATE_RATIO=model.SAMPLE_RATE_RATIO,
            _get_default_device=model.default_device,
        ),
        "dia.config": _module("dia.config", DiaConfig=config.OriginalConfig),
    }
    package.model, package.config = ours["dia.model"], ours["dia.config"]  # type: ignore[attr-defined]
    _before = {name: sys.modules.get(name) for name in _NAMES}
    sys.modules.update(ours)


def uninstall() -> None:
    """Takes back what `install` did."""
    global _before
    for name, module in (_before or {}).items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
    _before = None


def _module(name: str, **contents: object) -> ModuleType:
    module = ModuleType(name, f"{name} of the original package, as dia-fast offers it.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "dia")
    module.__dict__.update(contents)
    return module


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
