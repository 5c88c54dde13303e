"""Fixtures of the kernel tests. `tests/conftest.py` has chosen the executor.

`pytest tests/kernels --ops module:name` judges ops of one's own: the tests find them in the place of the shipped ones.
"""

import pytest
import torch

from tests.kernels import executor

if executor.interpreted():
    from bench.tools.interpreter import install

    install()


@pytest.fixture
def device() -> torch.device:
    """Device of the tensors under test."""
    return executor.device()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops", metavar="MODULE[:NAME]", help="ops of your own in the place of the shipped ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = config.getoption("--ops", None)
    if place is None:
        return
    from bench.tools.own_ops import chosen_ops
    from dia_kernels import triton as shipped

    own = chosen_ops(place)
    changed = {name: getattr(own, name) for name in shipped.__all__ if getattr(own, name) is not getattr(shipped, name)}
    by_op = {id(getattr(shipped, name)): op for name, op in changed.items()}
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for name, value in list(vars(module).items()):
            if id(value) in by_op:
                setattr(module, name, by_op[id(value)])
    for name, op in changed.items():
        setattr(shipped, name, op)
