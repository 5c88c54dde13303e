"""Text encoder, prefill, decode step and codec on a whole model of random weights."""

from functools import partial
from typing import Any

import pytest

from bench.suite import backends
from bench.suite.cases import CONTEXTS
from bench.suite.conftest import Session
from bench.suite.stages import Models, Stage


@pytest.fixture(scope="module")
def models(session: Session) -> Models:
    return Models(session.device, session.dtype, session.quick)


def obstacle(stage: Stage, backend: str, session: Session) -> str | None:
    found = backends.obstacle(backend, session.device.torch)
    if found is None and backend == "compile":
        if not session.device.gpu:
            return "on a CPU torch.compile takes minutes for a stage; the kernels are compared with it"
        if stage.kind != "step" or stage.requests > 1 or stage.size > CONTEXTS[0]:
            return "torch.compile takes a minute for a stage of other sizes: one step is enough"
    return found


def test_stage(
    stage: Stage, backend: str, session: Session, models: Models, proceed: Any, judged: Any, measure: Any
) -> None:
    proceed(stage.name, backend, obstacle(stage, backend, session))
    device = session.device
    ops = backends.op_set(backend, device.torch, session.own)
    work = models.work(stage, ops)
    if backend != "torch":
        judged(stage.name, backend, "model", backends.compare(ops, work.call))
    call = partial(work.call, ops)
    # Only a decode step runs as a graph in the engine, and only on kernels: the references read lengths on the host.
    graph = backend in ("triton", backends.OWN) and stage.kind == "step"
    repeated, captured = backends.captured(device, call) if graph else (call, False)
    facts = {
        "kind": stage.kind, "size": stage.size, "requests": stage.requests, "backend": backend, "bytes": work.bytes,
        "operations": work.operations, "captured": captured, "encoder_layers": models.config.encoder.num_hidden_layers,
        "decoder_layers": models.config.decoder.num_hidden_layers,
    }  # fmt: skip
    measure(repeated, 1, facts, work.reset)
