"""Widgets that do nothing, and the two errors."""

from typing import Any


class Error(Exception):
    pass


def Warning(message):
    print("gradio warning:", message)


class _Widget:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return _Widget()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Widget()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Widget()
