"""Every op at every shape of Dia-1.6B: on inputs that rotate, so that weights and caches come from the memory."""

from collections.abc import Callable
from typing import Any

from bench.suite import backends
from bench.suite.cases import Case
from bench.suite.conftest import FEW_CALLS, MEMORY, MOST_CALLS, Session

# Their references read lengths or choices back to the host: no graph holds them, and torch.compile breaks at each.
READ_BACK = ("rope_attention", "cross_attention", "ragged_attention", "rope", "sample")


def obstacle(case: Case, backend: str, session: Session) -> str | None:
    found = backends.obstacle(backend, session.device.torch)
    if backend == backends.OWN and backends.is_shipped(case.op, session.device.torch, session.own):
        return "the shipped op: --ops names no other one"
    if found is None and backend == "compile":
        if case.op in READ_BACK:
            return "the reference reads lengths on the host, where torch.compile ends its graph"
        if case.in_8_bits:
            return "torch.compile is timed on weights that are tensors"
        if not case.headline:
            return "torch.compile takes seconds for each shape: those of one request with guidance are enough"
    return found


def copies_for(case: Case, session: Session, wanted: int, call: Callable[[], Any]) -> int:
    """Return the sets of arguments a round goes through: as many as outgrow the cache, `wanted` bytes.

    An op so small that this would take very many gets as many as a fifth of its time allows; they stay in the cache.
    """
    device = session.device
    copies = -(-wanted // case.cost.bytes)
    if copies > FEW_CALLS:
        call()  # compiles
        start = device.now()
        call()
        once = max(device.now() - start, 1e-9)
        copies = min(copies, MOST_CALLS, max(FEW_CALLS // 4, int(session.seconds / 5 / once)))
    return max(1, min(copies, MEMORY[device.gpu] // case.memory))


def test_kernel(case: Case, backend: str, session: Session, proceed: Any, judged: Any, measure: Any) -> None:
    proceed(case.name, backend, obstacle(case, backend, session))
    device = session.device
    ops = backends.op_set(backend, device.torch, session.own)
    arguments = [case.make(ops, device.torch, 0)]
    if backend != "torch":
        verdicts = backends.compare(ops, lambda chosen: case.call(chosen, arguments[0])())
        judged(case.name, backend, case.subject, verdicts)
    cost = case.cost
    wanted = 2 * device.cache_bytes
    copies = copies_for(case, session, wanted, case.call(ops, arguments[0]))
    arguments += [case.make(ops, device.torch, seed) for seed in range(1, copies)]
    calls = [case.call(ops, chosen) for chosen in arguments]

    def work() -> None:
        for call in calls:
            call()

    graph = backend in ("triton", backends.OWN) or case.op not in READ_BACK
    repeated, captured = backends.captured(device, work) if graph else (work, False)
    facts = {
        "kind": "kernel", "op": case.subject, "shape": case.shape, "backend": backend, "context": case.context,
        "bytes": cost.bytes, "operations": cost.operations, "rotated_bytes": copies * cost.bytes,
        "cold": copies * cost.bytes >= wanted, "captured": captured,
    }  # fmt: skip
    measure(repeated, copies, facts, None)
