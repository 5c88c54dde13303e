"""The process: its socket, its log, and an end in which nobody's sound is cut off."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from dia_fast.errors import InputError
from dia_fast.server.app import create_app, guarded
from dia_fast.server.guard import Lines
from dia_fast.server.options import Options
from dia_fast.server.service import Service

if TYPE_CHECKING:
    from dia_fast.api import Dia

logger = logging.getLogger("dia_fast.server")

SEND_BUFFER = 1 << 18  # bytes for each connection: seconds of sound


class Server(uvicorn.Server):
    """uvicorn, which drains at the first signal and stops at the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but a server that was told to stop has not failed: the signal is not raised again."""
        self._loop = asyncio.get_running_loop()
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP"):
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._rescan)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.stop)

    def _rescan(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._loop.run_in_executor, None, self.service.voices.rescan)

    def stop(self) -> None:
        """Drain; called again, stop at once."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self.service.cancel_all()
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        options, service = self.service.options, self.service
        service.drain()
        logger.info("draining: %d responses under way, at most %g s", len(service.active), options.drain_seconds)
        await asyncio.sleep(options.drain_delay)
        for server in self.servers:
            server.close()
        end = time.monotonic() + options.drain_seconds
        while service.active and time.monotonic() < end:
            await asyncio.sleep(0.05)
        service.cancel_all()
        self.should_exit = True


def listen(options: Options) -> socket.socket:
    """The socket, bound before anything takes time.

    Raises:
        InputError: If the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        sock = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {options.host}, port {options.port}: {error.strerror or error}; --port 0 takes a free "
            "one"
        ) from error
    # Connections inherit it. The kernel would keep megabytes for a reader who takes nothing.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sock


def set_up_logging(form: str) -> None:
    """Logs go to standard error, a line for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(form))
    for name in ("dia_fast.server", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name.startswith("dia_fast") else logging.WARNING)


def serve(options: Options, load: "Callable[[], Dia]") -> None:
    """Serve until a signal says to stop.

    Args:
        options: What the operator chose.
        load: Makes the `Dia`, in a thread, while the server answers already.

    Raises:
        InputError: The address cannot be had.
        DiaFastError: The model cannot be loaded.
    """
    sock = listen(options)
    set_up_logging(options.log_format)
    service = Service(options, load)
    config = uvicorn.Config(
        guarded(create_app(service), service),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=5,
        ws_max_size=options.max_body,
    )
    server = Server(config, service)
    service.on_failure(server.stop)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"dia-fast: http://{shown}:{port} serves {options.served_name}; the API is at /docs", file=sys.stderr)
    server.run(sockets=[sock])
    if service.failure is not None:
        raise service.failure
