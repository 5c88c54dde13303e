"""Fixtures of the kernel tests. Chooses the executor before any test module imports Triton."""

from tests.kernels import executor

executor.choose()

import pytest
import torch

if executor.interpreted():
    from tests.kernels.interpreter import install

    install()


@pytest.fixture
def device() -> torch.device:
    """Device of the tensors under test."""
    return executor.device()
