"""A progress bar on standard error that says how far, how fast, and how that compares with the speed of speech."""

import time
from types import TracebackType
from typing import Any


class StepBar:
    """Counts decode steps: call it with the number of steps so far. Use it in a `with` block.

    total: steps at the length limit; most runs end earlier. steps_per_second: steps that make one second of sound.
    hidden: count, but draw nothing. `steps` and `seconds` say how far it is, from the beginning of the block to the
    last step: reading the text and the audio prompt counts, decoding the sound does not.
    """

    def __init__(self, total: int, steps_per_second: float, *, hidden: bool = False) -> None:
        self.total, self.realtime, self.hidden = total, steps_per_second, hidden
        self.steps, self.seconds = 0, 0.0
        self._start = 0.0
        self._bar: Any = None

    def __enter__(self) -> "StepBar":
        from tqdm import tqdm

        self._bar = tqdm(total=self.total, unit="step", disable=self.hidden, dynamic_ncols=True, leave=False)
        self._start = time.perf_counter()
        return self

    def __call__(self, steps: int) -> None:
        self.steps, self.seconds = steps, time.perf_counter() - self._start
        self._bar.set_postfix_str(f"{steps / self.seconds / self.realtime:.2f}x realtime", refresh=False)
        self._bar.update(steps - self._bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
