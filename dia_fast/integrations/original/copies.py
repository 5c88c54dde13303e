"""Copies of the original package's `model.py` in other programs, and a `Dia` that takes arguments as a copy does.

Forks have another order of arguments and other defaults, and their programs count on them.
"""

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

from dia_fast.integrations.original.model import Dia, tell_ignored

_OTHERS = re.compile(rb"^(?:import|from) (?:jax|flax|mlx)\b", re.MULTILINE)  # ports whose arrays are not torch's
_MARKS = (b"class Dia", b"def generate", b"def _load_dac_model")
_METHODS = ("__init__", "from_local", "from_pretrained", "generate")
_OURS = {name: set(inspect.signature(getattr(Dia, name)).parameters) for name in _METHODS}
_TAKEN = {name: names - {"use_cfg_filter", "audio_prompt_path", "device"} for name, names in _OURS.items()}
_SKIP = object()


def class_of(source: bytes) -> ast.ClassDef | None:
    """The `Dia` that a module's source defines, or None if it is no copy of the original's `model.py`."""
    if not all(mark in source for mark in _MARKS) or _OTHERS.search(source):
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Dia":
            names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            return node if {"generate", "_load_dac_model"} <= names else None
    return None


def alike(node: ast.ClassDef, module: str) -> type[Dia]:
    """`Dia` with the arguments of a copy, in their order and with its defaults where these are plain values."""
    made: dict[str, Any] = {"__module__": module, "__doc__": Dia.__doc__}
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in _METHODS:
            made[item.name] = _bound(item.name, _arguments(item), item.name == "generate" and _always_a_list(item))
    return type("Dia", (Dia,), made)


def _arguments(function: ast.FunctionDef) -> dict[str, Any]:
    """The arguments of a method but the first, in their order, each with its default."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)][1:]
    found: dict[str, Any] = dict.fromkeys(names, _SKIP)
    found |= {
        name: _value(default)
        for name, default in zip(names[len(names) - len(given.defaults) :], given.defaults, strict=True)
    }
    found |= {
        argument.arg: _SKIP if default is None else _value(default)
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    }
    return found


def _always_a_list(generate: ast.FunctionDef) -> bool:
    """Tell if the `generate` of a copy returns a list for a list of one text, too, which the original does not."""
    takes_lists = any("list" in ast.unparse(item.annotation) for item in generate.args.args[1:2] if item.annotation)
    results = [node.value for node in ast.walk(generate) if isinstance(node, ast.Return) and node.value is not None]
    return takes_lists and bool(results) and all(isinstance(value, ast.Name) for value in results)


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:  # `torch.device("cuda")` and the like: ours is as good
        return _SKIP


def _bound(method: str, theirs: Mapping[str, Any], always_a_list: bool) -> Any:
    """A method of the class for a copy. theirs: its arguments and their defaults."""
    base = getattr(Dia, method)

    def ours(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(theirs):
            raise TypeError(f"{method} takes at most {len(theirs)} arguments, not {len(args)}")
        given = dict(zip(theirs, args, strict=False))
        if twice := [name for name in options if name in given]:
            raise TypeError(f"{method} got two values for {twice[0]!r}")
        given |= options
        if method == "generate":
            given = _as_now(given, theirs)
        extra = [name for name in given if name in theirs and name not in _OURS[method]]
        tell_ignored([name for name in extra if given[name] != theirs[name]])
        defaults = {name: value for name, value in theirs.items() if value is not _SKIP and name in _TAKEN[method]}
        return defaults | {name: value for name, value in given.items() if name not in extra}

    def call(owner: Any, *args: Any, **options: Any) -> Any:
        found = getattr(base, "__func__", base)(owner, **ours(args, options))
        return [found] if always_a_list and not isinstance(found, list) else found

    call.__name__, call.__doc__ = method, base.__doc__
    return classmethod(call) if method.startswith("from_") else call


def _as_now(given: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` that early copies have and the original has deprecated since, as they are now."""
    given = dict(given)
    if theirs.get("use_cfg_filter", None) is True and not given.pop("use_cfg_filter", True):
        given["cfg_filter_top_k"] = None
    if "audio_prompt" not in theirs and "audio_prompt_path" in given:
        given["audio_prompt"] = given.pop("audio_prompt_path")
    return given
