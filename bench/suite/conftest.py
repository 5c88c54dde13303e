"""Options, parameters and records of the benchmark suite. See `bench.suite`."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import device as devices
from bench.device import Device, Peaks
from bench.suite import backends
from bench.suite.cases import Case, all_cases
from bench.suite.stages import Stage, all_stages
from dia_fast.diagnostics.doctor import Verdict, environment
from dia_fast.errors import InputError
from dia_fast.model.device import choose_dtype

WARM_UP = 3  # rounds
ROUNDS = (5, 200)
FEW_ROUNDS = 3  # of what takes more than a second
FEW_CALLS, MOST_CALLS = 64, 256  # in a round: without a question, and at most
MEMORY = {True: 2 << 30, False: 1 << 29}  # bytes of the arguments of a round, on a GPU and on a CPU


@dataclass
class Session:
    """State that all benchmarks of a run share. seconds: that the rounds of one benchmark take, about."""

    device: Device
    dtype: torch.dtype
    quick: bool
    backends: tuple[str, ...]
    seconds: float
    deadline: float
    peaks: Peaks
    distrusted: frozenset[str] = frozenset()
    own: str | None = None
    verdicts: list[dict[str, Any]] = field(default_factory=list)

    def note(self, group: str, backend: str, outcome: str, detail: str) -> None:
        self.verdicts.append({"group": group, "backend": backend, "outcome": outcome, "detail": detail})


KEY: "pytest.StashKey[Session]" = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dia-fast")
    group.addoption("--bench-device", default=None)
    group.addoption("--bench-dtype", default=None)
    group.addoption("--bench-quick", action="store_true")
    group.addoption("--bench-backends", default=",".join(backends.BACKENDS))
    group.addoption("--bench-ops", default=None, help="module, or module:name, of the backend own")
    group.addoption("--bench-limit", type=float, default=float("inf"), help="seconds; what is left then is skipped")
    group.addoption("--bench-distrust", default="", help="kernels, or model, that are known to be wrong on triton")
    group.addoption("--bench-verdicts", type=Path, help="file for what was checked, skipped and found wrong")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    try:
        device = devices.open_device(option("--bench-device"))
        dtype = choose_dtype(option("--bench-dtype"), device.torch)
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    quick = option("--bench-quick")
    config.stash[KEY] = Session(
        device,
        dtype,
        quick,
        tuple(option("--bench-backends").split(",")),
        0.03 if quick else 0.3 if device.gpu else 0.5,
        time.monotonic() + option("--bench-limit"),
        Peaks(1.0, 1.0),
        frozenset(filter(None, option("--bench-distrust").split(","))),
        option("--bench-ops"),
    )


def _cases(session: Session) -> list[Case]:
    requests = (1, 2, 8) if session.device.gpu or not session.quick else (2,)
    return all_cases(session.dtype, requests, session.quick)


def _stages(session: Session) -> list[Stage]:
    return all_stages(session.device.gpu, session.quick)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parameters are names, which reports can write; the fixtures `case` and `stage` say what they name."""
    session = metafunc.config.stash[KEY]
    for kind, found in (("case", _cases), ("stage", _stages)):
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, [one.name for one in found(session)], indirect=True)
    metafunc.parametrize("backend", session.backends)


@pytest.fixture(scope="session")
def _named(pytestconfig: pytest.Config) -> dict[str, Case | Stage]:
    session = pytestconfig.stash[KEY]
    found: list[Case | Stage] = [*_cases(session), *_stages(session)]
    return {one.name: one for one in found}


@pytest.fixture
def case(request: pytest.FixtureRequest, _named: dict[str, Any]) -> Case:
    found: Case = _named[request.param]
    return found


@pytest.fixture
def stage(request: pytest.FixtureRequest, _named: dict[str, Any]) -> Stage:
    found: Stage = _named[request.param]
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every benchmark reads the device's clock; those of one op at one shape stand together in the table."""
    for item in items:
        group, _ = _place(item)
        item.add_marker(pytest.mark.benchmark(timer=config.stash[KEY].device.now, group=group))
    # What compiles for minutes comes last: if the time is over before its end, the rest is there.
    items.sort(key=lambda item: item.callspec.params["backend"] == "compile")  # type: ignore[attr-defined]


def _place(item: pytest.Item) -> tuple[str, str]:
    """Of a benchmark in the table: what it measures, and on which backend."""
    parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    return parameters.get("case") or parameters["stage"], parameters["backend"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what raised; what is skipped or found wrong has been noted where that was found."""
    said = call.excinfo
    if said is not None and not said.errisinstance((pytest.skip.Exception, pytest.fail.Exception)):
        first = (str(said.value).strip() or "no message").splitlines()[0]
        item.config.stash[KEY].note(*_place(item), "failed", f"{said.typename}: {first}")
    return (yield)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    shared = request.config.stash[KEY]
    shared.peaks = devices.measure_peaks(shared.device, shared.dtype, shared.quick)
    with torch.inference_mode():
        yield shared


@pytest.fixture
def measure(session: Session, benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time a call that has been checked, and note what the time says."""

    def run(work: Callable[[], None], calls: int, facts: dict[str, Any], reset: Callable[[], None] | None) -> None:
        device = session.device
        device.calls = 1

        def prepare() -> None:
            if reset is not None:
                reset()
            device.hold()

        spans: list[float] = []
        # Warm-up: compiles, fills pools, and tells how many rounds fit.
        while not spans or (len(spans) < WARM_UP and sum(spans) < 4 * session.seconds):
            prepare()
            start = device.now()
            work()
            spans.append(device.now() - start)
        device.calls = calls
        least = ROUNDS[0] if spans[-1] < 1 else FEW_ROUNDS
        rounds = max(least, min(ROUNDS[1], int(session.seconds / max(spans[-1], 1e-9))))
        benchmark.pedantic(work, setup=prepare, rounds=rounds)
        device.calls = 1
        seconds = benchmark.stats.stats.median
        moved, operations = facts["bytes"], facts["operations"]
        benchmark.extra_info.update(
            facts,
            calls=calls,
            bandwidth=moved / seconds,
            speed=operations / seconds,
            share_of_bandwidth=moved / seconds / session.peaks.bandwidth,
            share_of_compute=operations / seconds / session.peaks.compute,
        )

    return run


@pytest.fixture
def judged(session: Session, benchmark: Any) -> Callable[[str, str, str, list[Verdict]], None]:
    """Note verdicts; end the test if one says that something else is computed: that has no time."""

    def judge(group: str, backend: str, subject: str, verdicts: list[Verdict]) -> None:
        wrong = [verdict for verdict in verdicts if not verdict.healthy]
        if backend == "triton" and subject in session.distrusted:
            wrong.append(Verdict(subject, "wrong", "was found wrong before"))
        detail = "; ".join(f"{v.op}: {v.detail}" for v in wrong or verdicts)
        session.note(group, backend, "wrong" if wrong else "ok", detail)
        if wrong:
            benchmark.skipped = True
            pytest.fail(f"{group} on {backend} is WRONG and has no time: {detail}", pytrace=False)

    return judge


@pytest.fixture
def proceed(session: Session, benchmark: Any) -> Callable[[str, str, str | None], None]:
    """Skip a benchmark that something stands in the way of, and note what."""

    def check(group: str, backend: str, reason: str | None) -> None:
        if reason is None and time.monotonic() > session.deadline:
            reason = "the time for the suite is over; give it more with --limit"
        if reason is not None:
            session.note(group, backend, "skipped", reason)
            pytest.skip(reason)

    return check


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Versions, device and what it reaches; no name of the machine or its user."""
    session = config.stash[KEY]
    return {
        **environment(session.device.torch),
        "device": session.device.name,
        "dtype": str(session.dtype).removeprefix("torch."),
        "vectors": backends.vectors(session.device.torch) if "compile" in session.backends else "not asked",
        "cache_bytes": session.device.cache_bytes,
        "size": "an eighth of Dia-1.6B's width" if session.quick else "Dia-1.6B",
        "measured": asdict(session.peaks),
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch", "author_time", "time"):
        commit_info.pop(name, None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--bench-verdicts")
    if file is not None:
        file.write_text(json.dumps(session.config.stash[KEY].verdicts, indent=1))
