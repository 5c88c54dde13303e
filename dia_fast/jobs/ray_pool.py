"""Items of a batch on the machines of a Ray cluster: actors with an engine each; the caller is the only writer."""

import os
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dia_fast.errors import DiaFastError, InputError
from dia_fast.jobs.items import Item
from dia_fast.jobs.runner import Spoken, speak_items
from dia_fast.utils.files import LARGEST_SOUND, read_regular
from dia_fast.utils.ray import cluster, first_line

if TYPE_CHECKING:
    from dia_fast.api import Dia

MOST_LOSSES = 3  # of actors that had an item, before the item itself is held to be the cause
_REPORT_SECONDS = 0.5  # between two words of an actor about its steps


@dataclass
class ActorReport:
    """Report of one actor: `steps` of all requests, `items`, and `seconds` of sound since it was ready."""

    name: str
    steps: int = 0
    items: int = 0
    seconds: float = 0.0
    since: float = 0.0
    failures: int = 0  # to start, in a row

    def count(self, spoken: Spoken) -> None:
        """Add an item."""
        self.items += 1
        self.seconds += len(spoken.samples) / spoken.sample_rate if spoken.sample_rate else 0.0

    def described(self) -> str:
        """For a person: how much, and how fast in terms of the speed of speech."""
        spent = max(time.monotonic() - self.since, 1e-9)
        return f"{self.name}: {self.items} items, {self.seconds:.2f} s of sound, {self.seconds / spent:.2f}x realtime"


@dataclass(frozen=True)
class PoolOptions:
    """Options of the use of a cluster.

    Attributes:
        address: Of a cluster, as `ray.init` takes it; `"local"` starts one on this machine and ends it afterwards.
        actors: How many; None for one a GPU, or on a cluster without one a CPU share of `cpus_per_actor`.
        cpus_per_actor: Which an actor reserves, and torch's threads in it where `--threads` says nothing.
        gpus_per_actor: None for 1 where the cluster has GPUs, else 0.
    """

    address: str
    actors: int | None = None
    cpus_per_actor: float = 1.0
    gpus_per_actor: float | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise InputError(f"--actors must be at least 1, not {self.actors}")
        if not 0 < self.cpus_per_actor <= 4096:
            raise InputError(f"--cpus-per-actor must be above 0, at most 4096, not {self.cpus_per_actor}")
        if self.gpus_per_actor is not None and not 0 <= self.gpus_per_actor <= 64:
            raise InputError(f"--gpus-per-actor must be from 0 to 64, not {self.gpus_per_actor}")


class _Speaker:
    """The actor: one engine."""

    def __init__(self, load: "Callable[[], Dia]") -> None:
        self._dia = load()
        self._dia.codec  # noqa: B018 - loaded before the first item, so that a failure is not an item's
        self._folder = tempfile.TemporaryDirectory(prefix="dia-fast-prompts-")

    def ready(self) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"

    def speak(self, items: list[Item], prompts: dict[str, Any]) -> Iterator[Spoken | int]:
        """Yield what becomes of each item; an int is a number of steps made since the last."""
        steps, told = 0, time.monotonic()

        def stepped(running: int) -> None:
            nonlocal steps
            steps += running

        local = [item if item.prompt is None else self._with_prompt(item, prompts) for item in items]
        for spoken in speak_items(self._dia, local, stepped):
            if steps and time.monotonic() - told >= _REPORT_SECONDS:
                yield steps
                steps, told = 0, time.monotonic()
            yield spoken
        yield steps

    def _with_prompt(self, item: Item, prompts: dict[str, Any]) -> Item:
        import ray

        assert item.prompt is not None
        path = Path(self._folder.name) / f"{item.prompt_digest}{item.prompt.suffix}"
        if not path.exists():
            path.write_bytes(ray.get(prompts[item.prompt_digest]))
        return replace(item, prompt=path)


def speak_on_ray(
    items: Sequence[Item],
    load: "Callable[[], Dia]",
    options: PoolOptions,
    *,
    begun: Callable[[], None] | None = None,
    stepped: Callable[[int], None] | None = None,
    told: Callable[[str], None] = lambda message: None,
) -> Generator[Spoken, None, None]:
    """Speak items on actors; yield each as it ends. What a lost actor had in hand is done again by others.

    Args:
        items: To be spoken.
        load: Makes the model, in each actor. It is pickled.
        options: The cluster and the actors.
        begun: Called when the first actor is ready.
        stepped: Called with the number of steps that were made since the last time.
        told: Called with a sentence for the user.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or it has no room for an actor.
    """
    with cluster(options.address) as ray:
        pool = _Pool(ray, items, load, options, told)
        try:
            yield from pool.results(begun, stepped)
            for report in pool.reports.values():
                told(report.described())
        finally:
            pool.close()


class _Pool:
    """Actors, and which items each has in hand."""

    def __init__(
        self,
        ray: Any,
        items: Sequence[Item],
        load: "Callable[[], Dia]",
        options: PoolOptions,
        told: Callable[[str], None],
    ) -> None:
        self.ray, self.options, self.told = ray, options, told
        self.waiting = deque(items)
        self.suspects: deque[Item] = deque()  # done alone, since their actor was lost twice
        self.losses: Counter[str] = Counter()
        self.reports: dict[Any, ActorReport] = {}  # by actor
        self.loading: dict[Any, Any] = {}  # by the reference of its readiness: an actor
        self.running: dict[Any, tuple[Any, dict[str, Item]]] = {}  # by generator: its actor, what it has in hand
        self.prompts: dict[str, Any] = {}
        self.count, gpus = self._sizes(len(items))
        actor = ray.remote(_Speaker).options(num_cpus=options.cpus_per_actor, num_gpus=gpus)
        self._new_actor = lambda: actor.remote(load)
        for number in range(1, self.count + 1):
            self._load(ActorReport(f"actor {number}"))

    def _load(self, report: ActorReport) -> None:
        """Start an actor, in place of the one before."""
        actor = self._new_actor()
        self.reports[actor] = report
        self.loading[actor.ready.remote()] = actor

    def _sizes(self, items: int) -> tuple[int, float]:
        whole = self.ray.cluster_resources()
        gpus = self.options.gpus_per_actor
        if gpus is None:
            gpus = 1.0 if whole.get("GPU", 0) else 0.0
        share, name = (gpus, "GPU") if gpus else (self.options.cpus_per_actor, "CPU")
        room = min(
            int(whole.get("CPU", 0) / self.options.cpus_per_actor), int(whole.get(name, 0) / share) if share else 0
        )
        if room < 1:
            raise InputError(
                f"the cluster at {self.options.address} has no room for an actor of {self.options.cpus_per_actor:g} "
                f"CPUs and {gpus:g} GPUs: it has {whole.get('CPU', 0):g} and {whole.get('GPU', 0):g}"
            )
        count = self.options.actors or room
        if count > room:
            raise InputError(
                f"--actors {count}: the cluster at {self.options.address} has room for {room} of "
                f"{self.options.cpus_per_actor:g} CPUs and {gpus:g} GPUs"
            )
        return min(count, items), gpus

    def results(
        self, begun: Callable[[], None] | None = None, stepped: Callable[[int], None] | None = None
    ) -> Iterator[Spoken]:
        """Yield what becomes of each item, once."""
        idle: deque[Any] = deque()
        while self.waiting or self.suspects or self.running:
            while idle and (self.waiting or self.suspects):
                self._assign(idle.popleft())
            ready, _ = self.ray.wait([*self.running, *self.loading], num_returns=1)
            if ready[0] in self.loading:
                actor = self._loaded(ready[0])
                if actor is not None:
                    idle.append(actor)
                    if begun is not None:
                        begun()
                        begun = None
                continue
            generator = ready[0]
            actor, in_hand = self.running[generator]
            report = self.reports[actor]
            try:
                word = self.ray.get(next(generator))
            except StopIteration:
                del self.running[generator]
                idle.append(actor)
            except self.ray.exceptions.RayActorError as error:
                del self.running[generator], self.reports[actor]
                self._load(report)
                yield from self._lost(report, in_hand, error)
            else:
                if isinstance(word, int):
                    report.steps += word
                    if stepped is not None:
                        stepped(word)
                else:
                    report.count(word)
                    del in_hand[word.id]
                    yield word

    def _loaded(self, reference: Any) -> Any | None:
        """The actor of a reference that is there, or None if it could not load and another is tried."""
        actor = self.loading.pop(reference)
        report = self.reports[actor]
        try:
            self.ray.get(reference)
            report.since = report.since or time.monotonic()
            report.failures = 0
            return actor
        except self.ray.exceptions.RayActorError as error:
            del self.reports[actor]
            report.failures += 1
            cause = _cause(error)
            if isinstance(cause, DiaFastError):
                raise cause from None  # it fails as all of them would
            self.told(f"{report.name} could not be started: {cause}")
            if report.failures < MOST_LOSSES:
                self._load(report)
            elif not self.reports:
                raise InputError(f"no actor could load the model: {cause}") from None
            return None

    def _assign(self, actor: Any) -> None:
        """Give an actor a share of what is left. Large ones keep its batch full, and cost nothing when it is lost."""
        if self.suspects:
            group = [self.suspects.popleft()]
        else:
            count = len(self.waiting) if self.count == 1 else -(-len(self.waiting) // (2 * self.count))
            group = [self.waiting.popleft() for _ in range(max(count, min(len(self.waiting), 4)))]
        for item in group:
            if item.prompt is not None and item.prompt_digest not in self.prompts:
                self.prompts[item.prompt_digest] = self.ray.put(read_regular(item.prompt, LARGEST_SOUND))
        prompts = {item.prompt_digest: self.prompts[item.prompt_digest] for item in group if item.prompt is not None}
        generator = actor.speak.options(num_returns="streaming").remote(group, prompts)
        self.running[generator] = actor, {item.id: item for item in group}

    def _lost(self, report: ActorReport, in_hand: dict[str, Item], error: Exception) -> Iterator[Spoken]:
        why = first_line(error)
        self.told(f"{report.name} was lost with {len(in_hand)} items in hand, which are done again: {why}")
        again = []
        for item in in_hand.values():
            self.losses[item.id] += 1
            if self.losses[item.id] >= MOST_LOSSES:
                said = f"the process that spoke it was lost {MOST_LOSSES} times: {why}"
                yield Spoken(item.id, np.zeros(0, np.float32), 0, None, said)
            elif self.losses[item.id] == MOST_LOSSES - 1:
                self.suspects.append(item)
            else:
                again.append(item)
        self.waiting.extendleft(reversed(again))

    def close(self) -> None:
        """End the actors, whatever they are at."""
        for actor in self.reports:
            self.ray.kill(actor, no_restart=True)


def _cause(error: Exception) -> Exception | str:
    """The error of dia_fast for which an actor could not load; else what Ray says of it."""
    cause: BaseException | None = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, DiaFastError):
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        kind, _, message = line.partition(": ")
        if message and kind.startswith("dia_fast.errors."):
            return InputError(message)
    return lines[-1] if lines else type(error).__name__
