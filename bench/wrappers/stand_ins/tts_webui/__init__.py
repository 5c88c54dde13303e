"""TTS-WebUI, of which an extension uses decorators and two helpers: each lets the function be what it is."""

import functools
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


def _decorator(*given, **_):
    """A decorator with or without arguments."""
    if len(given) == 1 and callable(given[0]):
        return given[0]
    return lambda function: functools.cache(function) if given == ("dia",) else function


def _named(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _decorator


class _Everything(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("tts_webui.") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = _named


sys.meta_path.append(_Everything())
