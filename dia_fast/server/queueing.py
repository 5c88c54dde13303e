"""Turns in the engine and those who wait for one, counted in the event loop: no lock, no step to wait for."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from dia_fast.server.errors import overloaded

_RECENT = 64  # ends of requests that the rate is taken from


class Gate:
    """Hands out the turns in an engine, first come, first served; a text that goes on comes before one that begins.

    Args:
        capacity: Most sequences at once.
        max_queue: Most requests that wait.
    """

    def __init__(self, capacity: int, max_queue: int) -> None:
        self.capacity, self.free, self.max_queue = capacity, capacity, max_queue
        self.waiting = 0
        """Requests that were let in and have had no turn yet."""
        self._first: deque[asyncio.Future[None]] = deque()
        self._others: deque[asyncio.Future[None]] = deque()
        self._ends: deque[float] = deque(maxlen=_RECENT)

    def check_room(self, count: int = 1) -> None:
        """Raise an error 429 if the queue has no room for so many requests."""
        if self.waiting + count > self.max_queue + self.free:
            raise overloaded(
                f"{self.waiting} requests are waiting, as many as this server keeps; try again later",
                "queue_full",
                self.retry_after(),
                429,
            )

    def retry_after(self) -> int:
        """Seconds until the queue has been worked off at the rate of late, 1 to 60."""
        if len(self._ends) < 2:
            return 1
        seconds = max(time.monotonic() - self._ends[0], 1e-3)
        return max(1, min(60, math.ceil(self.waiting * seconds / len(self._ends))))

    async def acquire(self, *, goes_on: bool) -> Callable[[], None]:
        """Wait for a turn; return the function that gives it back, which may be called more than once."""
        if self.free and not (self._first or self._others):
            self.free -= 1
        else:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            line = self._first if goes_on else self._others
            line.append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._give()
                elif future in line:
                    line.remove(future)
                raise
        given_back = False

        def release() -> None:
            nonlocal given_back
            if not given_back:
                given_back = True
                self._give()

        return release

    def ended(self) -> None:
        """Count a request that has been worked off."""
        self._ends.append(time.monotonic())

    def _give(self) -> None:
        while self._first or self._others:
            future = (self._first or self._others).popleft()
            if not future.done():
                future.set_result(None)
                return
        self.free += 1
