"""`from dia.model import Dia`, in a program that was written for the original package, finds ours.

Of the original's other modules (`dia.audio`, `dia.layers`, `dia.state`) dia-fast has no counterpart. Where the original
is installed they are its own; elsewhere importing a name from them says so.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from dia_fast.integrations.original import config, model

_INSIDE = ("dia.audio", "dia.layers", "dia.state")
_NAMES = ("dia", "dia.model", "dia.config", *_INSIDE)
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
        "dia.config": _module(
            "dia.config",
            DiaConfig=config.OriginalConfig,
            EncoderConfig=config.EncoderConfig,
            DecoderConfig=config.DecoderConfig,
        ),
    }
    if not places:
        ours |= {name: _module(name) for name in _INSIDE}
    for name, module in ours.items():
        if name != "dia":
            setattr(package, name.removeprefix("dia."), module)
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
    module.__dict__.update(contents, __getattr__=_refusal(name))
    return module


def _refusal(module: str) -> Callable[[str], object]:
    """`__getattr__` of a module: its own error, where Python would only name what is missing."""

    def missing(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{module}.{name} is of the original package, and dia_fast has no counterpart: it computes with kernels "
            "and an engine of its own. Use dia.model.Dia, or run the original without install()",
            name=module,
        )

    return missing


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
