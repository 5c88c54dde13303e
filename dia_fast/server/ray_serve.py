"""The server on a Ray cluster: the same application in every replica, and an ingress that hides the loss of one.

A request goes through Serve's proxy to the ingress, and from there to a replica. Of speech the ingress counts the bytes
that it has passed on. When a replica is lost, another one speaks the request again with the seed that the first had
named, and as many bytes are skipped: the same request with the same seed gives the same bytes.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from dia_fast.errors import InputError
from dia_fast.server.app import create_app, guarded
from dia_fast.server.errors import ApiError, overloaded
from dia_fast.server.options import Options
from dia_fast.server.run import set_up_logging
from dia_fast.server.service import Service
from dia_fast.server.socket_relay import LOST, Address, SocketHost, relay_socket
from dia_fast.utils.ray import cluster, first_line

if TYPE_CHECKING:
    from dia_fast.api import Dia

logger = logging.getLogger("dia_fast.server")

APP, REPLICA, INGRESS = "dia-fast", "Replica", "Ingress"
SPOKEN_PATHS = frozenset({"/v1/audio/speech"})
MOST_LOSSES = 1  # of replicas, in one response
_SPARE = 8  # requests above batch and queue that reach a replica, so that it is the one that refuses
_SCAN_SECONDS = 2.0
_STALE_SECONDS = 15.0


@dataclass(frozen=True)
class RayOptions:
    """Cluster, number and size of the replicas.

    Attributes:
        address: Of a cluster, as `ray.init` takes it; `"local"` starts one on this machine and ends it afterwards.
        replicas: At least so many.
        max_replicas: At most so many, as ongoing requests demand; None for `replicas`.
        cpus_per_replica: Which each reserves.
        gpus_per_replica: None for 1 where the cluster has GPUs, else 0.
    """

    address: str
    replicas: int = 1
    max_replicas: int | None = None
    cpus_per_replica: float = 1.0
    gpus_per_replica: float | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise InputError(f"--replicas must be at least 1, not {self.replicas}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise InputError(f"--max-replicas must be at least --replicas, {self.replicas}, not {self.max_replicas}")
        if not 0 < self.cpus_per_replica <= 4096:
            raise InputError(f"--cpus-per-replica must be above 0, at most 4096, not {self.cpus_per_replica}")


class Replica:
    """One engine and its application. What it gives for a request are messages of ASGI, without their wrapping."""

    def __init__(self, options: Options, load: "Callable[[], Dia]") -> None:
        set_up_logging(options.log_format)
        self.service = Service(options, load)
        self.app = guarded(create_app(self.service), self.service)
        self._scans: asyncio.Task[None] | None = None
        self._sockets = SocketHost(self.app)
        self._address: Address | None = None

    async def start(self) -> None:
        """Load the model. Raises what went wrong."""
        await self.service.load()
        if self.service.failure is not None:
            raise self.service.failure
        if self.service.options.voices is not None:
            self._scans = asyncio.ensure_future(self._scan())

    async def _scan(self) -> None:
        """See what other replicas, or anybody, have put into the folder of voices."""
        seen: list[tuple[str, int, int]] | None = None
        folder = self.service.options.voices
        assert folder is not None
        while True:
            with contextlib.suppress(OSError):
                stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
                now = [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
                if now != seen:
                    await self.service.in_thread(self.service.voices.rescan)
                    seen = now
            await asyncio.sleep(_SCAN_SECONDS)

    def state(self) -> str:
        """As `/ready` tells it."""
        return self.service.state

    def page(self) -> bytes:
        """The metrics, for Prometheus."""
        return bytes(self.service.metrics.page())

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[tuple[str, Any, Any]]:
        """Give `("start", status, headers)`, then `("body", data, more)` as often as there is some.

        Without a last message in which `more` is false, the response has failed, and must not end as if it had not.
        Closing this generator is the client's leaving.
        """
        left, put = asyncio.Event(), asyncio.Queue[tuple[str, Any, Any] | None](maxsize=4)
        read = False

        async def receive() -> Message:
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await put.put(("start", message["status"], list(message.get("headers", []))))
            else:
                await put.put(("body", message.get("body", b""), message.get("more_body", False)))

        async def work() -> None:
            try:
                await self.app(scope, receive, send)
            except Exception:
                logger.exception("a request has failed")
            finally:
                await put.put(None)

        working = asyncio.ensure_future(work())
        try:
            while (item := await put.get()) is not None:
                yield item
        finally:
            left.set()
            if not working.done():
                _, pending = await asyncio.wait({working}, timeout=1.0)
                for task in pending:
                    task.cancel()

    async def hold(self) -> AsyncIterator[Address]:
        """Yield where WebSockets are taken; the caller keeps this open as long as its own, so that it is counted."""
        if self._address is None:
            import ray

            self._address = await self._sockets.open(ray.util.get_node_ip_address())
        yield self._address
        await asyncio.Event().wait()

    async def close(self) -> None:
        """End everything and give the memory back."""
        self._sockets.close()
        if self._scans is not None:
            self._scans.cancel()
        self.service.drain()
        await self.service.close()


Answers = Callable[[dict[str, Any], bytes], AsyncGenerator[tuple[str, Any, Any], None]]
Holds = Callable[[], AsyncGenerator[Address, None]]


class Lost(Exception):
    """A replica went away in the middle of an answer."""


class Ingress:
    """The application in front of the replicas.

    Args:
        answers: Has a replica answer a request; raises `Lost` if it goes away.
        holds: Yields the address of a replica for one WebSocket.
        page: The metrics of all replicas.
        max_body: Largest request in bytes.
    """

    def __init__(self, answers: Answers, holds: "Holds", page: "Callable[[], Awaitable[bytes]]", max_body: int) -> None:
        self._answers, self._holds, self._page, self._max_body = answers, holds, page, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        elif scope["path"] == "/health":
            await _respond(send, 200, b"application/json", b'{"status":"ok"}')
        elif scope["path"] == "/metrics":
            await _respond(send, 200, b"text/plain; version=0.0.4; charset=utf-8", await self._page())
        else:
            await self._relay(scope, receive, send)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._holds()) as held:
                async for address in held:
                    await relay_socket(address, scope, receive, send)
                    break
        except Lost:
            await send(LOST)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(receive)
        if body is None:
            error = ApiError(413, f"the body is larger than the {self._max_body} bytes of --max-body")
            await error.response()(scope, receive, send)
            return
        plain = plain_scope(scope)
        sending = asyncio.ensure_future(self._send(plain, body, send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await sending

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size = list[bytes](), 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _send(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        """Pass an answer on; when its replica is lost, go on where it was with the answer of another one."""
        passed, begun = Passed(), False
        for losses in range(MOST_LOSSES + 1):
            try:
                async with contextlib.aclosing(self._answers(scope, body)) as answer:
                    async for kind, first, second in answer:
                        if kind == "start":
                            if not begun:  # Serve's proxy names the request itself
                                second = [item for item in second if bytes(item[0]).lower() != b"x-request-id"]
                                await send({"type": "http.response.start", "status": first, "headers": second})
                            begun = True
                            body = passed.begin(scope["path"], first, second, body)
                        elif data := passed.new(first):
                            await send({"type": "http.response.body", "body": data, "more_body": True})
                        if kind == "body" and not second:
                            await send({"type": "http.response.body", "body": b"", "more_body": False})
                            return
                return  # it has failed, and its client is to notice
            except Lost as error:
                logger.warning("a replica was lost: %s", error)
                if losses == MOST_LOSSES or begun and not passed.can_resume:
                    break
                passed.again()
        if not begun:
            await overloaded("the replica that had the request was lost", "replica_lost", 1).response()(
                scope, _nothing, send
            )


class Passed:
    """Count what of a response has reached the client, so that a second one can go on from there."""

    def __init__(self) -> None:
        self.can_resume = False
        self._events = False
        self._count = self._skip = 0  # bytes of sound: passed on, and yet to be skipped
        self._rest = b""

    def begin(self, path: str, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
        """A response has begun. Returns the body to ask with in case it has to be asked again."""
        named = {bytes(name).lower(): bytes(value) for name, value in headers}
        self._events = named.get(b"content-type", b"").startswith(b"text/event-stream")
        if path not in SPOKEN_PATHS or status != 200 or b"x-seed" not in named:
            return body
        self.can_resume = True
        return json.dumps({**json.loads(body), "seed": int(named[b"x-seed"])}).encode()

    def again(self) -> None:
        """The response comes from its beginning once more."""
        self._skip, self._rest = self._count, b""

    def new(self, data: bytes) -> bytes:
        """The part of some data that the client does not have yet."""
        if self._events:
            return self._new_events(data)
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._count += len(data) - skipped
        return data[skipped:]

    def _new_events(self, data: bytes) -> bytes:
        """Events are compared by the sound in them, since comments between them come at any time."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        out = []
        for event in events:
            if not event.startswith(b"event: speech.audio.delta\n"):
                out.append(event)
                continue
            head, _, told = event.partition(b"data: ")
            fields = json.loads(told)
            sound = base64.b64decode(fields["audio"])
            skipped = min(self._skip, len(sound))
            self._skip -= skipped
            self._count += len(sound) - skipped
            if skipped < len(sound):
                fields["audio"] = base64.b64encode(sound[skipped:]).decode()
                out.append(head + b"data: " + json.dumps(fields).encode())
        return b"".join(event + b"\n\n" for event in out)


def plain_scope(scope: Scope) -> dict[str, Any]:
    """The parts of a scope that can be sent to another process."""
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    plain = {name: scope[name] for name in names if name in scope}
    plain["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    for name in ("client", "server"):
        plain[name] = tuple(scope[name]) if scope.get(name) else None
    return plain


def merged_pages(pages: dict[str, bytes]) -> bytes:
    """Metrics of several replicas as one page, each with a label that names its replica."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Any] = {}
    for name, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            kept = families.setdefault(family.name, family)
            samples = [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]
            kept.samples = samples if kept is family else [*kept.samples, *samples]
    registry = CollectorRegistry()

    class Collected:
        def collect(self) -> Any:
            return families.values()

    registry.register(Collected())
    return bytes(generate_latest(registry))


class Board:
    """The actor at which replicas leave their metrics."""

    def __init__(self) -> None:
        self._pages: dict[str, tuple[float, bytes]] = {}

    def put(self, name: str, page: bytes) -> None:
        self._pages[name] = time.monotonic(), page

    def pages(self) -> dict[str, bytes]:
        """By replica; without those that have not been heard of for a while."""
        now = time.monotonic()
        self._pages = {name: item for name, item in self._pages.items() if now - item[0] < _STALE_SECONDS}
        return {name: page for name, (_, page) in sorted(self._pages.items())}


def application(options: Options, load: "Callable[[], Dia]", ray_options: RayOptions, gpus: float) -> Any:
    """The application for `serve.run`."""
    import ray
    from ray import serve

    board = ray.remote(Board).options(num_cpus=0).remote()
    scaling: dict[str, Any] = {"num_replicas": ray_options.replicas}
    if ray_options.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": ray_options.replicas,
                "max_replicas": ray_options.max_replicas,
                "target_ongoing_requests": max(1, options.max_batch // 2),
            }
        }
    ending = options.drain_seconds + 5
    replicas = serve.deployment(
        _replica_class(options, load, board),
        name=REPLICA,
        max_ongoing_requests=options.max_batch + options.max_queue + _SPARE,
        graceful_shutdown_timeout_s=ending,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": ray_options.cpus_per_replica, "num_gpus": gpus},
        **scaling,
    )

    class ServedIngress:
        def __init__(self, replicas: Any) -> None:
            del replicas  # named here so that Serve starts it first

    ingress = serve.deployment(
        serve.ingress(lambda: _ingress(options, board))(ServedIngress),
        name=INGRESS,
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=ending,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind())


def _replica_class(options: Options, load: "Callable[[], Dia]", board: Any) -> type:
    """A replica as Serve makes and ends it."""
    from ray import serve

    class ServedReplica(Replica):
        async def __init__(self) -> None:  # type: ignore[misc]  # Serve waits for it
            super().__init__(options, load)
            await self.start()
            self._name = str(serve.get_replica_context().replica_id.unique_id)
            self._reports = asyncio.ensure_future(self._report())

        async def _report(self) -> None:
            while True:
                with contextlib.suppress(Exception):
                    await board.put.remote(self._name, self.page())
                await asyncio.sleep(1.0)

        def check_health(self) -> None:
            if self.state() == "failed":
                raise RuntimeError(f"the engine has failed: {self.service.failure}")

        async def __del__(self) -> None:
            self._reports.cancel()
            await self.close()

    return ServedReplica


def _ingress(options: Options, board: Any) -> Ingress:
    """The ingress, in the process that Serve has started for it."""
    import ray
    from ray import serve

    handle = serve.get_deployment_handle(REPLICA, APP).options(stream=True)

    async def streamed(response: Any) -> AsyncGenerator[Any, None]:
        try:
            async for item in response:
                yield item
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
            raise Lost(first_line(error)) from error
        finally:
            response.cancel()

    def answers(scope: dict[str, Any], body: bytes) -> AsyncGenerator[tuple[str, Any, Any], None]:
        return streamed(handle.answer.remote(scope, body))

    def holds() -> AsyncGenerator[Address, None]:
        return streamed(handle.hold.remote())

    async def page() -> bytes:
        return merged_pages(await board.pages.remote())

    return Ingress(answers, holds, page, options.max_body)


def serve_on_ray(options: Options, load: "Callable[[], Dia]", ray_options: RayOptions) -> None:
    """Serve until a signal says to stop.

    Args:
        options: What the operator chose.
        load: Makes the `Dia`, in each replica. It is pickled.
        ray_options: The cluster.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or no replica can be started.
    """
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    stopped: list[int] = []
    with cluster(ray_options.address) as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise InputError('Ray Serve is not installed: pip install "dia-fast[ray]"') from error
        gpus = ray_options.gpus_per_replica
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        port = options.port or _free_port(options.host)
        options = replace(options, port=port)
        serve.start(http_options={"host": options.host, "port": port})
        before = {number: signal.signal(number, lambda *_: stopped.append(1)) for number in _SIGNALS}
        try:
            serve.run(application(options, load, ray_options, gpus), name=APP, route_prefix="/", blocking=False)
            shown = f"[{options.host}]" if ":" in options.host else options.host
            print(f"dia-fast: http://{shown}:{port} serves {options.served_name} on Ray", file=sys.stderr, flush=True)
            while not stopped:
                time.sleep(0.1)
        except RuntimeError as error:
            if not stopped:
                raise InputError(f"the replicas could not be started: {_why(serve, error)}") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            serve.shutdown()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _why(serve: Any, error: Exception) -> str:
    """The reason for which a replica could not start, as Serve tells it."""
    told = [str(error)]
    with contextlib.suppress(Exception):
        status = serve.status().applications[APP]
        told += [item.message for item in status.deployments.values() if item.message] + [status.message]
    for line in reversed("\n".join(told).splitlines()):
        kind, _, message = line.strip().partition(": ")
        if message and kind.startswith("dia_fast.errors."):
            return message
    return told[-1].strip().splitlines()[-1] if told[-1].strip() else type(error).__name__


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


async def _respond(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
