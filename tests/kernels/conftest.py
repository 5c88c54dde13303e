"""Fixtures of the kernel tests. `tests/conftest.py` has chosen the executor."""

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
