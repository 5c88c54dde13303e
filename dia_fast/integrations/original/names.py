"""`from dia.model import Dia`, in a program that was written for the original package, finds ours.

Programs install the package or carry a copy of it, under any name: a finder in front of Python's own looks at each
module that may be its `model.py` and knows it by what its source defines. Only that module is replaced. The others of
the package stay what they are, and so do the other names in it, which are taken from the original when asked for.
Where there is no package at all, `dia`, `dia.model` and `dia.config` are made of ours.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dia_fast.errors import InputError, shown
from dia_fast.integrations.original import config, copies, model
from dia_fast.utils.warn import warn

_INSIDE = ("dia.audio", "dia.layers", "dia.state")
_NAMES = ("dia", "dia.model", "dia.config", *_INSIDE)
_MODEL = {
    "Dia": model.Dia,
    "ComputeDtype": config.ComputeDtype,
    "DEFAULT_SAMPLE_RATE": model.DEFAULT_SAMPLE_RATE,
    "SAMPLE_RATE_RATIO": model.SAMPLE_RATE_RATIO,
    "_get_default_device": model.default_device,
    "get_default_device": model.default_device,
}
_CONTENTS: dict[str, dict[str, Any]] = {
    "dia": {"Dia": model.Dia},
    "dia.model": _MODEL,
    "dia.config": {
        "DiaConfig": config.OriginalConfig,
        "EncoderConfig": config.EncoderConfig,
        "DecoderConfig": config.DecoderConfig,
        "DataConfig": config.DataConfig,
        "ModelConfig": config.ModelConfig,
        "TrainingConfig": config.TrainingConfig,
    },
}
_before: dict[str, ModuleType] = {}


def install(also: Collection[str] = (), *, discover: bool = True, quirks: bool = False) -> None:
    """Make the original package's `Dia` resolve to dia-fast wherever it is imported from now on, until `uninstall`.

    Call it before the program imports the package. What was imported before is imported anew; what was taken out of it
    by then stays what it is, and a warning says so.

    Args:
        also: names of modules that hold a `Dia` of the original's kind and are not known by themselves.
        discover: look for copies of the package under other names than `dia`.
        quirks: repeat the original's off-by-one (see `Dia`), for its tokens to the last one.

    Raises:
        InputError: for names that cannot be those of modules.
    """
    for name in [also] if isinstance(also, str) else also:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"also must be names of modules, such as 'program.dia.model', not {shown(name)}")
    if isinstance(also, str):
        raise InputError(f"also must be a list of names, not the one name {shown(also)}")
    model.Dia.quirks = quirks
    if _finder in sys.meta_path:
        _finder.also |= set(also)
        _finder.discover |= discover
    else:
        _finder.also, _finder.discover = set(also), discover
        sys.meta_path.insert(0, _finder)
    importlib.invalidate_caches()
    for name, module in list(sys.modules.items()):
        # Ours are in `made`; a package that only hands Dia on imports it again.
        if name.split(".")[0] == "dia" and name not in _finder.made:
            _before.setdefault(name, sys.modules.pop(name))
        elif (name in _finder.also or _is_copy(module, name)) and name not in _finder.made:
            _replace(name, module)


def uninstall() -> None:
    """Take back what `install` did."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    model.Dia.quirks = False
    for name in list(sys.modules):
        if name in _finder.made or name.split(".")[0] == "dia":
            del sys.modules[name]
            _bind(name, None)
    for name, module in _before.items():
        sys.modules[name] = module
        _bind(name, module)
    _finder.made.clear()
    _before.clear()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ours in the place of a module that is, or is said to be, the original's."""

    def __init__(self) -> None:
        self.also: set[str] = set()
        self.discover = True
        self.made: set[str] = set()
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        last = fullname.rpartition(".")[2].lower()
        named = fullname in _NAMES or fullname in self.also
        if self._busy or not (named or (self.discover and (last == "model" or "dia" in last))):
            return None
        real = self._real(fullname, path, target)
        found = _copy_at(real.origin) if real is not None and real.origin else None
        if fullname == "dia":
            places = list(real.submodule_search_locations or []) if real is not None else []
            if any(_copy_at(os.path.join(place, "model.py")) for place in places):
                return None  # the package itself, whose `model` is found here in its turn
            spec = importlib.machinery.ModuleSpec(fullname, _Loader(_CONTENTS["dia"]), is_package=True)
            spec.submodule_search_locations = places
        elif found is not None or (real is not None and fullname in self.also):
            assert real is not None
            kind = model.Dia if found is None else copies.alike(found, fullname)
            loader = _Loader(_MODEL | {"Dia": kind}, real)
            spec = importlib.machinery.ModuleSpec(fullname, loader, origin=real.origin)
            spec.has_location = real.has_location
        elif real is None and named and self._ours(fullname):
            spec = importlib.machinery.ModuleSpec(fullname, _Loader(_CONTENTS.get(fullname, {})))
            if fullname in self.also:
                spec.loader = _Loader(_MODEL)
        else:
            return None
        self.made.add(fullname)
        return spec

    def _ours(self, fullname: str) -> bool:
        """Tell whether a module that is nowhere is to be made: of a package that is ours itself, or one asked for."""
        return fullname in self.also or "dia" in self.made

    def _real(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module without this finder."""
        self._busy = True  # finders of other tools ask the import system in their turn
        try:
            for finder in list(sys.meta_path):
                spec = None if finder is self else finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        except (ImportError, AttributeError, ValueError):
            pass
        finally:
            self._busy = False
        return None


_finder = _Finder()


class _Loader(importlib.abc.Loader):
    """Makes a module of ours. original: the spec of the module that it stands for."""

    def __init__(self, contents: dict[str, Any], original: importlib.machinery.ModuleSpec | None = None) -> None:
        self.contents, self.original = contents, original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        missing = _refusal(module.__name__) if self.original is None else _fetch(self.original)
        vars(module).update(self.contents, __getattr__=missing)
        module.__doc__ = f"{module.__name__} of the original package, as dia-fast offers it."


def _fetch(original: importlib.machinery.ModuleSpec) -> Callable[[str], object]:
    """`__getattr__` of a module that stands for another, which is run when a name is first asked for."""
    made: list[ModuleType] = []

    def missing(name: str) -> object:
        if name.startswith("__") and not made:
            raise AttributeError(name)
        if not made:
            assert original.loader is not None
            other = importlib.util.module_from_spec(original)
            original.loader.exec_module(other)
            made.append(other)
        return getattr(made[0], name)

    return missing


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


def _copy_at(path: str) -> Any:
    """The `Dia` of a file that is a copy of the original's `model.py`, or None."""
    try:
        return copies.class_of(Path(path).read_bytes()) if path.endswith(".py") else None
    except OSError:
        return None


def _is_copy(module: ModuleType, name: str) -> bool:
    """Tell whether an imported module is a copy of the original's `model.py`."""
    kind = vars(module).get("Dia") if isinstance(module, ModuleType) else None
    return isinstance(kind, type) and kind.__module__ == name and not issubclass(kind, model.Dia) and all(
        hasattr(kind, method) for method in ("generate", "_load_dac_model")
    )  # fmt: skip


def _replace(name: str, module: ModuleType) -> None:
    """Put ours in the place of a module that was imported already."""
    _before[name] = sys.modules.pop(name)
    parent = sys.modules.get(name.rpartition(".")[0])
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = module
        raise
    _bind(name, sys.modules[name])
    holders = sorted(
        other
        for other, holder in list(sys.modules.items())
        if holder is not module and holder is not parent and isinstance(holder, ModuleType)
        and vars(holder).get("Dia") is vars(module).get("Dia")
    )  # fmt: skip
    told = f" by {', '.join(holders)}" if holders else ""
    warn(
        f"{name} was imported before install(): what was taken out of it{told} is still the original's. Call install() "
        "first",
        UserWarning,
    )


def _bind(name: str, module: ModuleType | None) -> None:
    """Let the attribute of a parent package be its module in `sys.modules`."""
    parent, _, last = name.rpartition(".")
    holder = sys.modules.get(parent)
    if holder is None:
        return
    if module is not None:
        setattr(holder, last, module)
    elif last in vars(holder):
        delattr(holder, last)
