"""From requests to codes: one engine for a single call, a batch, a stream and a server."""

from collections.abc import Callable, Sequence

from dia_fast.engine.batch_rows import collect, place, prefill
from dia_fast.engine.decode_graphs import Stepper
from dia_fast.engine.handle import Cancelled, Handle
from dia_fast.engine.hooks import Hooks, StepTensors
from dia_fast.engine.memory import sizes_for
from dia_fast.engine.metrics import EngineEvent, Stats
from dia_fast.engine.request import Generation, Plan, Request, plan
from dia_fast.engine.scheduler import MAX_BATCH, DeadlineExceeded, Engine, EngineFull, StepFailed
from dia_fast.engine.session import Session, Verified, longest_agreed
from dia_fast.model.model import DiaModel

__all__ = [
    "Cancelled",
    "DeadlineExceeded",
    "Engine",
    "EngineEvent",
    "EngineFull",
    "Generation",
    "Handle",
    "Hooks",
    "Plan",
    "Request",
    "Session",
    "Stats",
    "StepFailed",
    "StepTensors",
    "Stepper",
    "Verified",
    "collect",
    "generate",
    "longest_agreed",
    "place",
    "plan",
    "prefill",
]

Progress = Callable[[int], None]


def generate(
    model: DiaModel, requests: Sequence[Request], *, progress: Progress | None = None, engine: Engine | None = None
) -> list[Generation]:
    """Speak all requests as one batch, up to 32 at a time.

    Args:
        model: With its weights loaded.
        requests: What to speak.
        progress: Called after every decode step with the number of steps since the start.
        engine: The one to use, of the same model; by default one that is made for these requests. A request whose
            prompt and `max_new_tokens` together exceed the model's positions is cut there.

    Raises:
        InputError: Before any work, for a text or a prompt that the model cannot take.
        Exception: Of the request that ended with one; the others are cancelled then.
    """
    plans = [plan(model.config, request) for request in requests]
    if not plans:
        return []
    if engine is None:
        engine = Engine(model, sizes=sizes_for(model.config, plans, MAX_BATCH, model.dtype, model.device))
    handles: list[Handle] = []
    start = engine.steps
    try:
        handles += [engine.submit(request) for request in requests]
        while not all(handle.done for handle in handles):
            before = engine.steps
            engine.advance()
            if progress is not None and engine.steps > before:
                progress(engine.steps - start)
        return [handle.result() for handle in handles]
    finally:
        for handle in handles:
            handle.cancel()
