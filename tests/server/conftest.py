"""One server process for all tests that leave it as it was."""

import os
from collections.abc import Iterator

import pytest

from tests.server.serving import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    more = os.environ.get("SERVE_WITH", "").split()  # as `make test-ray` has it
    with serving(*more, patience=240 if more else 60) as running:
        yield running


@pytest.fixture(scope="session")
def tight() -> Iterator[Server]:
    """One request at a time, one in the queue, a key that is needed."""
    options = ("--max-batch", "1", "--max-queue", "1", "--max-body", "70000", "--request-timeout", "4")
    with serving(*options, DIA_FAST_API_KEY="open sesame", DIA_FAST_LOG_FORMAT="json") as running:
        yield running
