"""Load the server: many speak at once, a third of them leaves, a tenth means it harm.

    python -m bench.serving_http [--streams 200] [--seconds 300] [--schemathesis] [--json FILE] [-- OPTIONS OF SERVE]

Starts `dia-fast serve` with the demo voice on this machine. Each of a set of requests is spoken alone; then so many
clients ask for them again and again. Some leave at a random moment, some are hostile: they read slowly, send bodies
that are huge, broken or never end. Prints the time to the first byte, gaps between pieces, throughput, the growth of
the server's memory, and what a request costs the processor beside the engine alone. Fails if a finished stream differs
from the one that was spoken alone, if a status 5xx other than 503 and 504 was seen, or if a batch row stays taken.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.tools.http_client import Exchange, call
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError

SPEECH = "/v1/audio/speech"
TEXTS = (
    "[S1] Open the red door.",
    "[S1] Please close the white window. [S2] Yes, thank you.",
    "[S1] Hello, good morning. [S2] Hello, good evening.",
    "[S1] The number is seven four two.",
    "[S1] Call the office, please. [S2] Good evening. [S1] My house is in the black garden.",
)
FORMATS = ("wav", "pcm", "flac", "mp3")  # not opus: the serial number of an Ogg stream is drawn
LONG = " ".join(TEXTS) * 3
HUGE = 30_000_000  # bytes, more than --max-body
LAST_WORDS = 60  # seconds that schemathesis may take to tell what it has found


@dataclass
class Server:
    """A running server."""

    process: "subprocess.Popen[str]"
    port: int

    async def metric(self, name: str) -> float:
        page = (await call(self.port, "GET", "/metrics")).body.decode()
        return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"dia_fast_{name}[{{ ]", line))

    async def until(self, name: str, value: float, seconds: float = 60.0) -> bool:
        """Wait until a metric has a value; whether it came to that."""
        end = time.monotonic() + seconds
        while (found := await self.metric(name) == value) is False and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return found

    def memory(self) -> float:
        """Resident megabytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu(self) -> float:
        """Processor seconds so far, over all threads."""
        parts = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(options: Sequence[str]) -> Iterator[Server]:
    """A server until the end of the block. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "dia_fast", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://\S+?:(\d+) serves", line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise RuntimeError("the server does not start")
        threading.Thread(target=_troubles, args=(process,), daemon=True).start()
        yield Server(process, int(found[1]))
    finally:
        process.kill()
        process.wait()


def _troubles(process: "subprocess.Popen[str]") -> None:
    """Pass on what the server's log says that is not the line of a request."""
    assert process.stderr is not None
    for line in process.stderr:
        if " INFO " not in line:
            print(line, end="", file=sys.stderr)


@dataclass(frozen=True)
class Job:
    """A request and what it gives when nobody else asks."""

    fields: dict[str, Any]
    expected: bytes


@dataclass
class Record:
    """Results as the clients saw them."""

    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def status(self, number: int, what: str) -> None:
        self.statuses[str(number)] += 1
        if number >= 500 and number not in (503, 504):
            self.faults.append(f"{what}: status {number}")


async def alone(server: Server, count: int) -> list[Job]:
    """Speak each of so many requests with nobody else there."""
    jobs = []
    asked = [(TEXTS[0], form) for form in FORMATS] + list(zip(TEXTS[1:], FORMATS, strict=False))
    for index, (text, form) in enumerate(asked[:count]):
        fields = {"input": text, "seed": 3 + index, "response_format": form}
        done = await call(server.port, "POST", SPEECH, fields)
        if done.status != 200:
            raise RuntimeError(f"{fields}: status {done.status}: {done.body[:200]!r}")
        jobs.append(Job(fields, done.body))
    return jobs


async def finish(server: Server, job: Job, record: Record) -> None:
    """Listen to the end and compare."""
    async with Exchange(server.port) as exchange:
        start = last = time.monotonic()
        await exchange.request("POST", SPEECH, job.fields)
        record.status(await exchange.answer(), "speech")
        if exchange.status != 200:
            await exchange.whole()
            await asyncio.sleep(min(2.0, float(exchange.headers.get("retry-after", 1))))
            return
        body = b""
        async for piece in exchange.pieces():
            moment = time.monotonic()
            if body:
                record.gaps.append(moment - last)
            else:
                record.firsts.append(moment - start)
            body, last = body + piece, moment
        record.kinds["finished"] += 1
        if body != job.expected:
            record.faults.append(f"{job.fields}: {len(body)} bytes differ from the {len(job.expected)} spoken alone")


async def leave(server: Server, job: Job, record: Record, dice: random.Random) -> None:
    """Leave at a random moment: before the first byte, or in the middle."""
    async with Exchange(server.port) as exchange:
        await exchange.request("POST", SPEECH, {**job.fields, "input": LONG})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_listen(exchange), dice.expovariate(0.5))
        record.kinds["left"] += 1
        if exchange.status:
            record.status(exchange.status, "left")


async def _listen(exchange: Exchange) -> None:
    await exchange.answer()
    await exchange.whole()


async def read_slowly(exchange: Exchange, dice: random.Random) -> None:
    """Read less than is spoken, and leave."""
    await exchange.request("POST", SPEECH, {"input": LONG, "response_format": "wav"})
    await exchange.answer()
    end = time.monotonic() + dice.uniform(1, 8)
    async for _ in exchange.pieces():
        await asyncio.sleep(0.5)
        if time.monotonic() > end:
            return


async def send_too_much(exchange: Exchange, dice: random.Random) -> None:
    """Send a chunked body that is longer than the server takes."""
    await exchange.send(f"POST {SPEECH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(HUGE // 0x10000):
            await exchange.send(block)
    await exchange.answer()


async def announce_too_much(exchange: Exchange, dice: random.Random) -> None:
    """Announce a body of a terabyte."""
    await exchange.send(f"POST {SPEECH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**12}\r\n\r\n".encode())
    await exchange.answer()


async def break_multipart(exchange: Exchange, dice: random.Random) -> None:
    """Send a form whose parts are not closed."""
    body = b'--x\r\nContent-Disposition: form-data; name="audio_sample"; filename="a\r\n' + dice.randbytes(4000)
    await exchange.request("POST", "/v1/audio/voices", body, "multipart/form-data; boundary=x")
    await exchange.answer()


async def never_end(exchange: Exchange, dice: random.Random) -> None:
    """Send the beginning of a body and nothing more."""
    await exchange.send(f"POST {SPEECH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
    await asyncio.sleep(dice.uniform(0, 5))


async def send_noise(exchange: Exchange, dice: random.Random) -> None:
    """Send bytes that are not HTTP."""
    await exchange.send(dice.randbytes(dice.randrange(1, 3000)))
    await asyncio.wait_for(exchange.answer(), 1)


async def send_broken_json(exchange: Exchange, dice: random.Random) -> None:
    """Send JSON with three random bytes in it."""
    text = json.dumps({"input": TEXTS[0], "seed": 3, "voice": "alloy", "speed": 1.0}).encode()
    at = dice.randrange(len(text))
    await exchange.request("POST", SPEECH, text[:at] + dice.randbytes(3) + text[at + 3 :])
    await exchange.answer()


HOSTILE: tuple[Callable[[Exchange, random.Random], Awaitable[None]], ...] = (
    read_slowly,
    send_too_much,
    announce_too_much,
    break_multipart,
    never_end,
    send_noise,
    send_broken_json,
)


async def attack(server: Server, record: Record, dice: random.Random) -> None:
    """Do one thing that no client should."""
    work = dice.choice(HOSTILE)
    # A server may close the connection of such a client at any moment.
    with contextlib.suppress(OSError, EOFError, asyncio.TimeoutError, asyncio.LimitOverrunError):
        async with Exchange(server.port, 1 << 12 if work is read_slowly else 1 << 16) as exchange:
            try:
                await work(exchange, dice)
            finally:
                record.kinds["hostile"] += 1
                if exchange.status:
                    record.status(exchange.status, work.__name__)


async def client(server: Server, jobs: list[Job], record: Record, options: argparse.Namespace, number: int) -> None:
    """One of many, until the time is over."""
    dice = random.Random(options.seed * 10_007 + number)
    end = time.monotonic() + options.seconds
    await asyncio.sleep(dice.uniform(0, min(5.0, options.seconds / 10)))
    while time.monotonic() < end:
        chance, job = dice.random(), dice.choice(jobs)
        try:
            if chance < options.hostile:
                await attack(server, record, dice)
            elif chance < options.hostile + options.leave:
                await leave(server, job, record, dice)
            else:
                await finish(server, job, record)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            record.faults.append(f"a connection broke: {type(error).__name__} {error}")


async def watch(server: Server, record: Record) -> None:
    """Note the server's memory."""
    start = time.monotonic()
    while True:
        record.memory.append((time.monotonic() - start, server.memory()))
        await asyncio.sleep(1)


async def fuzz(server: Server, seconds: float, record: Record) -> None:
    """Let schemathesis make requests from the server's own description; what it finds is a fault."""
    program = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        raise RuntimeError("schemathesis is not installed: pip install schemathesis")
    command = [program, "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--max-examples", "10000", "--exclude-path-regex", "^/(metrics|docs)$", "--no-color"]
    # What a shell starts in the background ignores SIGINT, and so would what this starts.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:  # it leaves a cache in the current one
        running = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, preexec_fn=heeding
        )
        assert running.stdout is not None
        reading = asyncio.ensure_future(running.stdout.read())
        try:
            await asyncio.wait_for(running.wait(), seconds)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                running.send_signal(signal.SIGINT)  # it tells what it has found so far
            try:
                await asyncio.wait_for(running.wait(), LAST_WORDS)
            except asyncio.TimeoutError:
                running.kill()
                record.faults.append(f"schemathesis did not end within {LAST_WORDS} s of SIGINT")
        told = (await reading).decode()
    for line in told.splitlines():
        # It calls every 5xx a fault; 503 and 504 are answers of a server that is full.
        if found := re.search(r"\[(5\d\d)\]", line):
            record.status(int(found[1]), f"schemathesis: {line.strip()[:100]}")
    made = re.search(r"(\d+) generated", told)
    record.kinds["schemathesis"] += int(made[1]) if made else 0
    if not record.kinds["schemathesis"] and seconds >= 60:  # it takes seconds to begin
        record.faults.append(f"schemathesis made no request: {told.strip()[-300:]}")


async def load(server: Server, options: argparse.Namespace) -> tuple[list[Job], Record, dict[str, Any]]:
    """All clients for so many seconds; then everybody is gone."""
    while (await call(server.port, "GET", "/ready")).status != 200:
        await asyncio.sleep(0.1)
    jobs, record = await alone(server, options.requests), Record()
    watching = asyncio.ensure_future(watch(server, record))
    sound, start = await server.metric("audio_seconds_total"), time.monotonic()
    work = [client(server, jobs, record, options, number) for number in range(options.streams)]
    if options.schemathesis:
        work.append(fuzz(server, options.seconds, record))
    await asyncio.gather(*work)
    wall = time.monotonic() - start
    found: dict[str, Any] = {"seconds": round(wall, 1)}
    found["sound per second"] = round((await server.metric("audio_seconds_total") - sound) / wall, 2)
    for name in ("running", "waiting", "active", "pages"):
        if not await server.until(name, 0):
            record.faults.append(f"{name} is {await server.metric(name)} at the end, not 0")
    watching.cancel()
    return jobs, record, found


def slope(samples: list[tuple[float, float]]) -> float:
    """Growth per minute over the second half, by least squares."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return 0.0
    return 60 * statistics.linear_regression(*zip(*late, strict=True)).slope


def part(values: list[float], share: float) -> float:
    """Return a quantile, rounded."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3) if values else float("nan")


async def cost(server: Server, jobs: list[Job], together: int) -> dict[str, float]:
    """Processor and wall seconds of the server for each request, so many at a time."""
    before, start = server.cpu(), time.perf_counter()
    for first in range(0, len(jobs), together):
        batch = jobs[first : first + together]
        await asyncio.gather(*(call(server.port, "POST", SPEECH, job.fields) for job in batch))
    count, wall = len(jobs), time.perf_counter() - start
    return {"cpu": round((server.cpu() - before) / count, 4), "wall": round(wall / count, 4)}


def engine_alone(jobs: list[Job], together: int) -> dict[str, float]:
    """The same texts in one call for each batch, in this process."""
    from dia_fast import Dia
    from dia_fast.cli.speak import set_threads
    from dia_fast.model.fused_weights import parameter_count

    dia = Dia.from_pretrained("demo")
    set_threads(None, parameter_count(dia.config))
    dia.generate(TEXTS[0], seed=3)
    cpu, start = time.process_time(), time.perf_counter()
    for first in range(0, len(jobs), together):
        batch = [job.fields for job in jobs[first : first + together]]
        dia.generate([item["input"] for item in batch], seed=[item["seed"] for item in batch], split="auto")
    count = len(jobs)
    return {
        "cpu": round((time.process_time() - cpu) / count, 4),
        "wall": round((time.perf_counter() - start) / count, 4),
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="serving_http", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=200, help="clients at a time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="how long they ask (%(default)s)")
    parser.add_argument("--leave", type=float, default=1 / 3, help="share that leaves before the end (a third)")
    parser.add_argument("--hostile", type=float, default=0.1, help="share that means harm (%(default)s)")
    parser.add_argument("--schemathesis", action="store_true", help="let it make requests from openapi.json meanwhile")
    parser.add_argument("--requests", type=int, default=8, help="different requests, 1 to 8 (%(default)s)")
    parser.add_argument("--together", type=int, default=8, help="requests at a time when costs are measured")
    parser.add_argument("--seed", type=int, default=0, help="of who does what")
    add_options(parser)
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="for dia-fast serve, after --")
    return parser


async def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults."""
    # Each client has its place in the queue: what is to be seen here is not the 429 of a full one.
    with serving(["--max-queue", str(options.streams), *options.serve]) as server:
        jobs, record, found = await load(server, options)
        found["server, seconds a request"] = await cost(server, jobs, options.together)
    found["engine alone, seconds a request"] = engine_alone(jobs, options.together)
    found |= {
        "requests": dict(record.kinds),
        "statuses": dict(sorted(record.statuses.items())),
        "first byte, seconds": {f"p{share}": part(record.firsts, share / 100) for share in (50, 95, 99)},
        "gap, seconds": {f"p{share}": part(record.gaps, share / 100) for share in (50, 95, 99)},
        "memory, MB": {
            "first": round(record.memory[0][1], 1),
            "last": round(record.memory[-1][1], 1),
            "growth a minute": round(slope(record.memory), 2),
        },
    }
    return found, record.faults


def main(given: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(given)
    try:
        results = Results(parser, options, given)
        found, faults = asyncio.run(measure(options))
    except (RuntimeError, DiaFastError) as error:
        print(f"serving_http: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        print(f"{name:32} {shown}")
    for fault, count in Counter(faults).most_common(20):
        print(f"FAULT ({count}): {fault}")
    if not faults:
        print("every finished stream is the one that was spoken alone; every batch row is free")
    for name, value in found.items():
        results.add({"figure": name}, value if isinstance(value, dict) else {"value": value})
    results.add({"figure": "faults"}, dict(Counter(faults)))
    return results.end(1 if faults else 0)


if __name__ == "__main__":
    sys.exit(main())
