"""Decode steps by captured graphs, one for each batch size; launch by launch where there are none."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeAlias

from dia_fast.engine.hooks import Hooks, step_tensors
from dia_fast.errors import InputError
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.model import DiaModel
from dia_fast.utils.cuda_graphs import CudaGraphs
from dia_fast.utils.warn import warn

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a step, which has been made on the same buffers if `Stepper` calls, and returns what repeats its launches."""

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Batch sizes that a graph is captured for; a batch between two of them runs in the larger one, padded."""


class Replays:
    """Makes the same launches over and over, told apart by keys.

    The first time they are made launch by launch, which compiles and loads the kernels; the second time a graph is
    captured, and that and all later times it is replayed. If a capture fails a warning says why, and everything is made
    launch by launch from then on: slower, with equal results.

    Args:
        capture: Makes a graph; without it there are none.
    """

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._made: set[Hashable] = set()

    def __call__(self, key: Hashable, name: str, make: Callable[[], Callable[[], None]]) -> None:
        """Do it once more.

        Args:
            key: Of the launches and of the buffers that they work on.
            name: Of it in a warning.
            make: Returns what makes the launches.
        """
        replay = self._replays.get(key)
        if replay is None and self.capture is not None and key in self._made:
            replay = self._captured(key, name, make())
        if replay is not None:
            replay()
            return
        make()()
        self._made.add(key)

    def _captured(self, key: Hashable, name: str, launches: Callable[[], None]) -> Callable[[], None] | None:
        assert self.capture is not None
        try:
            replay = self.capture(launches)
        except Exception as error:
            warn(
                f"{name} could not be captured as a graph ({type(error).__name__}: {error}); steps run launch by "
                "launch instead, which is slower",
                RuntimeWarning,
            )
            self.capture = None
            self._replays.clear()
            return None
        self._replays[key] = replay
        return replay


class Stepper:
    """Runs decode steps of one `DecodeState`, each bucket as `Replays` does.

    Args:
        capture: Makes a graph of a step, once for each bucket and with and without guidance. Without it every batch
            size is its own bucket, since padding would only cost.
        hooks: What a program of its own adds to each step.
    """

    def __init__(
        self, model: DiaModel, state: DecodeState, capture: Capture | None = None, hooks: Hooks | None = None
    ) -> None:
        self.model, self.state, self.hooks = model, state, hooks
        sizes = range(1, state.batch + 1)
        self.buckets: Sequence[int] = sizes if capture is None else _up_to(state.batch)
        self._views: dict[tuple[int, bool], DecodeState] = {}
        self._replays = Replays(capture)

    def view(self, count: int, guided: bool) -> DecodeState:
        """The buffers for `count` requests: those of the smallest bucket that holds them, the same ones every time."""
        key = self.buckets[bisect_left(self.buckets, count)], guided
        if key not in self._views:
            self._views[key] = self.state.view(*key)
        return self._views[key]

    def __call__(self, view: DecodeState) -> None:
        """One step of a view that `view` returned."""
        name = f"the decode step for {view.batch} requests"
        self._replays((view.batch, view.guided), name, partial(self._step, view))

    def _step(self, view: DecodeState) -> Callable[[], None]:
        """Return what makes a step launch by launch."""
        hooks = self.hooks
        if hooks is None or (hooks.in_step is None and hooks.sample is None):
            return partial(self.model.decode_step, view)
        tensors = step_tensors(view)
        called: dict[str, Any] = {
            name: partial(hook, tensors) for name in ("in_step", "sample") if (hook := getattr(hooks, name))
        }
        return partial(self.model.decode_step, view, **called)


def choose_capture(wanted: Capture | str | None, model: DiaModel) -> Capture | None:
    """The function that captures steps of this model, or None. Raises InputError for anything else."""
    if isinstance(wanted, str):
        if wanted != "auto":
            raise InputError(f'capture must be "auto", None or a function, not {wanted!r}')
        # The torch ops read lengths back to the host: no graph can hold them.
        return CudaGraphs() if model.device.type == "cuda" and model.ops.name == "triton" else None
    if wanted is not None and not callable(wanted):
        raise InputError(f'capture must be "auto", None or a function, not {wanted!r}')
    return wanted


def _up_to(batch: int) -> list[int]:
    """The buckets for at most `batch` requests, `batch` itself the last."""
    return [size for size in BUCKETS if size < batch] + [batch]
