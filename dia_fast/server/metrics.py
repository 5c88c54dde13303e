"""Metrics of a server in a registry of its own, for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dia_fast.engine import EngineEvent

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 300)
_STEPS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.5)
_FACTORS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        into: dict[str, Any] = {"registry": self.registry, "namespace": "dia_fast"}
        self.requests = Counter("requests", "HTTP requests", ["endpoint", "format", "status"], **into)
        self.queue = Histogram("queue_seconds", "from the request until it runs", buckets=_SECONDS, **into)
        self.first_byte = Histogram("first_byte_seconds", "from the request to sound", buckets=_SECONDS, **into)
        self.factor = Histogram("realtime_factor", "seconds of sound by seconds of work", buckets=_FACTORS, **into)
        self.audio = Counter("audio_seconds", "sound made", **into)
        self.steps = Counter("steps", "decode steps", **into)
        self.step_seconds = Histogram("step_seconds", "of one decode step", buckets=_STEPS, **into)
        self.started = Histogram("start_seconds", "of a sequence, to the engine's batch", buckets=_SECONDS, **into)
        self.first_frame = Histogram(
            "first_frame_seconds", "of a sequence, to its first frame", buckets=_SECONDS, **into
        )
        self.ended = Counter("sequences", "that have ended", ["reason"], **into)
        self.swaps = Counter("swaps", "sequences that made way for lack of pages", **into)
        self.disconnects = Counter("disconnects", "clients that left before the end", **into)
        self.cut = Counter("cut", "speech that reached its length limit", **into)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is asked when it is read."""
        Gauge(name, about, registry=self.registry, namespace="dia_fast").set_function(value)

    def build_info(self, **labels: str) -> None:
        """Export versions, model and device as labels."""
        gauge = Gauge("build_info", "always 1", list(labels), registry=self.registry, namespace="dia_fast")
        gauge.labels(**labels).set(1)

    def stepped(self, seconds: float) -> None:
        """Count a step."""
        self.steps.inc()
        self.step_seconds.observe(seconds)

    def heard(self, event: EngineEvent) -> None:
        """Count an event of the engine; called in the thread that makes its steps."""
        if event.kind == "started":
            self.started.observe(event.seconds)
        elif event.kind == "first_frame":
            self.first_frame.observe(event.seconds)
        elif event.kind == "swapped_out":
            self.swaps.inc()
        elif event.kind == "ended":
            self.ended.labels(event.reason).inc()

    def page(self) -> bytes:
        """The contents of `/metrics`."""
        return generate_latest(self.registry)
