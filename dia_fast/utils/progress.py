"""A progress bar on standard error that says how far, how fast, and how that compares with the speed of speech."""

import sys
import time
from types import TracebackType
from typing import Any


class StepBar:
    """Counts decode steps: call it with the number of steps so far. Use it in a `with` block.

    Args:
        total: Steps expected; a longer run moves it.
        steps_per_second: Steps that make one second of sound.
        hidden: Count, but draw nothing. `steps` and `seconds` say how far it is, from the beginning of the block to the
            last step: reading the text and the audio prompt counts, decoding the sound does not.
    """

    def __init__(self, total: int, steps_per_second: float, *, hidden: bool = False) -> None:
        self.total, self.realtime, self.hidden = total, steps_per_second, hidden
        self.steps, self.seconds = 0, 0.0
        self._start = 0.0
        self._bar: Any = None

    def __enter__(self) -> "StepBar":
        from tqdm import tqdm

        self._bar = tqdm(total=self.total, unit="step", disable=self.hidden, dynamic_ncols=True)
        self._start = time.perf_counter()
        return self

    def __call__(self, steps: int) -> None:
        first = not self.steps
        self.steps, self.seconds = steps, time.perf_counter() - self._start
        self._bar.set_postfix_str(f"{steps / self.seconds / self.realtime:.2f}x realtime", refresh=False)
        self._bar.total = max(self._bar.total, steps)
        self._bar.update(steps - self._bar.n)
        if first:  # the rest is drawn now and then; a short run would end before
            self._bar.refresh()

    def segments(self, done: int, count: int, total: int) -> None:
        """Show how many of `count` segments of a script are done.

        Args:
            total: Steps expected of all.
        """
        self._bar.total = max(total, self.steps)
        self._bar.set_description_str(f"{done}/{count} segments", refresh=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.steps:
            self._bar.total = self.steps  # what was expected no longer matters
        self._bar.close()


class ItemBar:
    """Counts items, and shows how fast they come in terms of the speed of speech. Use it in a `with` block.

    Args:
        total: items.
        done: Of them, before now.
        steps_per_second: Steps that make one second of sound.
        hidden: Draw nothing.
    """

    def __init__(self, total: int, done: int, steps_per_second: float, *, hidden: bool = False) -> None:
        from tqdm import tqdm

        self.realtime = steps_per_second
        self.rows = 0
        self._bar = tqdm(
            total=total, initial=done, unit="item", disable=hidden, dynamic_ncols=True, leave=False, mininterval=0.5
        )
        self._start = time.perf_counter()

    def __enter__(self) -> "ItemBar":
        return self

    def restart(self) -> None:
        """The clock starts now: loading does not count."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def stepped(self, running: int) -> None:
        """After a step of `running` requests."""
        self.rows += running
        self._bar.set_postfix_str(f"{self.rows / self.seconds / self.realtime:.2f}x realtime", refresh=False)
        self._bar.update(0)

    def ended(self, message: str | None = None) -> None:
        """After an item, with what there is to say about it."""
        if message is not None:
            self.tell(message)
        self._bar.update(1)

    def tell(self, message: str) -> None:
        """Print above the bar."""
        self._bar.write(message, file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
