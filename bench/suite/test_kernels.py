"""Every op at every shape of Dia-1.6B: on inputs that rotate, so that weights and caches come from the memory."""

from typing import Any

from bench.suite import backends
from bench.suite.cases import Case
from bench.suite.conftest import MEMORY, MOST_CALLS, Session

# Their references read lengths or choices back to the host: no graph holds them, and torch.compile breaks at each.
READ_BACK = ("rope_attention", "cross_attention", "ragged_attention", "rope", "sample")


def obstacle(case: Case, backend: str, session: Session) -> str | None:
    found = backends.obstacle(backend, session.device.torch)
    if found is None and backend == "compile":
        if case.op in READ_BACK:
            return "the reference reads lengths on the host, where torch.compile ends its graph"
        if not case.headline:
            return "torch.compile takes seconds for each shape: those of one request with guidance are enough"
    return found


def test_kernel(case: Case, backend: str, session: Session, proceed: Any, judged: Any, measure: Any) -> None:
    proceed(case.name, backend, obstacle(case, backend, session))
    device = session.device
    ops = backends.op_set(backend, device.torch)
    cost = case.cost
    wanted = 2 * device.cache_bytes
    copies = max(1, min(-(-wanted // cost.bytes), MOST_CALLS, MEMORY[device.gpu] // case.memory))
    arguments = [case.make(ops, device.torch, seed) for seed in range(copies)]
    if backend != "torch":
        verdicts = backends.compare(ops, lambda chosen: case.call(chosen, arguments[0])())
        judged(case.name, backend, case.op, verdicts)

    calls = [case.call(ops, chosen) for chosen in arguments]

    def work() -> None:
        for call in calls:
            call()

    graph = backend == "triton" or case.op not in READ_BACK
    repeated, captured = backends.captured(device, work) if graph else (work, False)
    facts = {
        "kind": "kernel", "op": case.op, "shape": case.shape, "backend": backend, "context": case.context,
        "bytes": cost.bytes, "operations": cost.operations, "rotated_bytes": copies * cost.bytes,
        "cold": copies * cost.bytes >= wanted, "captured": captured,
    }  # fmt: skip
    measure(repeated, copies, facts, None)
