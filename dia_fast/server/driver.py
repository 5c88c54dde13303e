"""The thread that owns the engine: it alone submits, cancels and makes steps, so the event loop never waits for one."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dia_fast.engine import Engine, Handle, Request

logger = logging.getLogger("dia_fast.server")


@dataclass(eq=False)
class _Submission:
    request: Request
    accepted: "asyncio.Future[Handle]"
    ended: Callable[[], None]


@dataclass(eq=False)
class _Waiter:
    handle: Handle
    frames: int
    future: "asyncio.Future[None]"


class Driver:
    """Makes the steps of an engine in a thread of its own. Its methods are called in the event loop.

    Args:
        engine: Nobody else may wait for handles of it.
        loop: In which results are delivered.
        stepped: Called in the thread after each step, with its seconds.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, stepped: Callable[[float], None]) -> None:
        self.engine, self._loop, self._stepped = engine, loop, stepped
        self._submissions: deque[_Submission] = deque()
        self._cancelled: deque[Handle] = deque()
        self._arriving: deque[_Waiter] = deque()
        self._waiters: list[_Waiter] = []
        self._live: dict[Handle, Callable[[], None]] = {}
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="dia-fast-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request, ended: Callable[[], None]) -> Handle:
        """Submit a request whose frames will be read; `ended` is called in the loop when it has left the engine.

        A caller that is cancelled here leaves the request to this driver: it is ended, and `ended` called.

        Raises:
            InputError, OutOfPages: The engine does not take it. `ended` is not called then.
        """
        accepted = self._loop.create_future()
        self._submissions.append(_Submission(request, accepted, ended))
        self._wake.set()
        try:
            return await accepted
        except asyncio.CancelledError:
            # The answer may have come before the cancellation, while the caller was about to go on.
            if not accepted.cancelled():
                if accepted.exception() is None:
                    self.cancel(accepted.result())
                else:
                    ended()
            raise

    async def wait(self, handle: Handle, frames: int) -> None:
        """Wait until so many frames are complete, or nothing more will come."""
        if handle.done or handle.has(frames):
            return
        waiter = _Waiter(handle, frames, self._loop.create_future())
        self._arriving.append(waiter)
        self._wake.set()
        await waiter.future

    def cancel(self, handle: Handle) -> None:
        """End a request before the next step."""
        self._cancelled.append(handle)
        self._wake.set()

    def stop(self) -> None:
        """End the thread; everything that is not done is cancelled."""
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        from time import perf_counter

        while not self._stopped:
            self._wake.clear()
            self._take()
            before, start = self.engine.steps, perf_counter()
            try:
                work = self.engine.step()
            except Exception:
                logger.exception("the engine failed; what was running has failed with it")
                work = bool(self._live)
            if self.engine.steps > before:
                self._stepped(perf_counter() - start)
            self._tell()
            if not work:
                self._wake.wait()
        self.engine.close()
        self._tell()

    def _take(self) -> None:
        while self._submissions:
            item = self._submissions.popleft()
            try:
                handle = self.engine.submit(item.request, stream=True)
            except Exception as error:
                self._call(_refuse, item, error)
                continue
            self._live[handle] = item.ended
            self._call(self._accept, item.accepted, handle)
        while self._cancelled:
            self._cancelled.popleft().cancel()
        while self._arriving:
            self._waiters.append(self._arriving.popleft())

    def _tell(self) -> None:
        """Wake those whose frames are there, and let go of what has ended; one call into the loop for all."""
        ready = [item for item in self._waiters if item.handle.done or item.handle.has(item.frames)]
        ended = [handle for handle in self._live if handle.done]
        calls = [self._live.pop(handle) for handle in ended]
        if ready or calls:
            self._waiters = [item for item in self._waiters if item not in ready]
            self._call(_deliver, ready, calls)

    def _accept(self, accepted: "asyncio.Future[Handle]", handle: Handle) -> None:
        if accepted.cancelled():
            self.cancel(handle)
        else:
            accepted.set_result(handle)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has ended
            self._stopped = True


def _refuse(item: _Submission, error: Exception) -> None:
    if item.accepted.cancelled():
        item.ended()
    else:
        item.accepted.set_exception(error)


def _deliver(ready: list[_Waiter], calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
    for item in ready:
        if not item.future.done():
            item.future.set_result(None)
