"""The time of a decode step on a device, between a best and a worst case.

    launch = gap + serial + max(memory - early, flight, issue, cache, compute, turns)
    step   = max(sum of launches + start of the graph, time of the host)

memory: bytes over bandwidth. early: with programmatic dependent launch, what arrives during gap and serial, at most
the bytes that the programs with room beside the launch in front request. flight: Little's law, program by program: a
program takes `bytes / bytes in flight` times the latency, and there are `programs / (resident * SMs)` waves of them.
issue: warp instructions over the issue slots of the SMs that have a program. cache: what is read again, too, comes
through L2. compute: operations, padding included. turns: every program of an attention, those beyond the context too,
has to find out where it stands; in the worst case nothing hides that and it is added. gap: from one kernel to the next.
serial: loads that wait for loads, the reduction at a program's end, the sampler's bisections.

No launch is ever predicted to be faster than its weights, keys and values over the published bandwidth.
"""

from dataclasses import dataclass
from math import ceil, floor

from dia_fast.diagnostics.roofline import assumptions as assumed
from dia_fast.diagnostics.roofline import work as counted
from dia_fast.diagnostics.roofline.devices import Device
from dia_fast.diagnostics.roofline.figures import Figure, Figures, load
from dia_fast.diagnostics.roofline.work import Step, Work
from dia_fast.engine.decode_graphs import BUCKETS
from dia_fast.generation.inputs import FRAMES_PER_SECOND
from dia_fast.model.config import DiaConfig
from dia_fast.model.quantization import FLOAT

STEPS_PER_SECOND = FRAMES_PER_SECOND  # of realtime: a step makes one frame of the codec
IN_FRONT = {
    "qkv": "down", "self_attention": "qkv", "o": "self_attention", "cross_q": "o", "cross_attention": "cross_q",
    "cross_o": "cross_attention", "gate_up": "cross_o", "down": "gate_up", "heads": "down",
}  # fmt: skip
"""The launch in front of each that begins early, in all layers but the first."""
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Workload:
    """A step to predict.

    Args:
        requests: At once.
        context: Tokens of sound of each.
        text: Bytes of text of each.
        graph: A CUDA graph of the step, in which requests are padded to the next size that the engine captures.
        weights: Of `quantization.WEIGHTS`.
    """

    config: DiaConfig
    dtype: str
    requests: int
    context: int
    text: int
    guided: bool = True
    graph: bool = True
    weights: str = FLOAT

    @property
    def step(self) -> Step:
        """The launches' shapes, in an engine that has room for any request."""
        padded = (
            next(size for size in (*BUCKETS, self.requests) if size >= self.requests) if self.graph else self.requests
        )
        decoder, encoder = self.config.decoder, self.config.encoder
        return Step(
            self.requests, self.context, self.text, SIZES[self.dtype], self.guided, padded,
            decoder.max_position_embeddings + 1, encoder.max_position_embeddings, weights=self.weights,
        )  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Seconds: best and worst case."""

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> "Range":
        return Range(self.low * factor, self.high * factor)

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Line:
    """One launch.

    Args:
        each: Time of one of them.
        parts: The parts of that time, see the module.
        ceiling: Seconds that its weights, keys and values take at the published bandwidth.
        bound: The part that decides.
    """

    work: Work
    each: Range
    parts: dict[str, Range]
    ceiling: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """A whole step. gpu: sum of its launches; host: time of the host beside it; step: the longer of the two."""

    device: Device
    workload: Workload
    figures: Figures
    lines: list[Line]
    gpu: Range
    host: Range
    step: Range
    ceiling: float
    notes: list[str]

    @property
    def launches(self) -> int:
        return sum(line.work.times for line in self.lines)

    def moved(self) -> int:
        return sum(line.work.times * line.work.moved for line in self.lines)

    def streamed(self) -> int:
        return sum(line.work.times * line.work.streamed for line in self.lines)


def predict(device: Device, workload: Workload, compiled: Figures | None = None) -> Prediction:
    """The prediction for one device.

    Args:
        workload: Checked, see `dia_fast.cli.plan`.
        compiled: Figures of the kernels; by default those of the default configs.
    """
    first, step = workload.config.first_generation, workload.step
    found = compiled or load(device.target, workload.dtype, workload.weights, first_generation=first)
    decoder = workload.config.decoder
    tiles = counted.Tiles(
        block=lambda name, rows: found.find(name, rows).block,
        self_split=counted.split(decoder.head_dim, step.itemsize, device.target, counted.SELF_SPLIT),
        cross_split=counted.split(decoder.cross_head_dim, step.itemsize, device.target, counted.CROSS_SPLIT),
        reads_twice=device.target.startswith("gfx") or workload.dtype == "float16",
    )
    works = {item.name: item for item in counted.launches(workload.config, step, tiles)}
    lines = [
        _line(item, works[IN_FRONT[name]] if name in IN_FRONT else None, found, device, workload)
        for name, item in works.items()
    ]
    gpu = Range(0.0, 0.0)
    for line in lines:
        gpu += line.each.times(line.work.times)
    launches = sum(line.work.times for line in lines)
    if workload.graph:
        host = Range(assumed.HOST_STEP.best, assumed.HOST_STEP.worst)
        busy = gpu + Range(assumed.GRAPH_START.best, assumed.GRAPH_START.worst)
    else:
        host, busy = Range(assumed.HOST_LAUNCH.best, assumed.HOST_LAUNCH.worst).times(launches), gpu
    whole = Range(max(busy.low, host.low), max(busy.high, host.high))
    ceiling = sum(line.ceiling * line.work.times for line in lines)
    made = Prediction(device, workload, found, lines, gpu, host, whole, ceiling, [])
    made.notes.extend(_notes(made))
    return made


def _line(item: Work, front: Work | None, found: Figures, device: Device, workload: Workload) -> Line:
    cases, ends = [], []
    for worst in (False, True):
        early = _early(item, front, found, device, worst)
        case = _parts(item, found, device, workload, early, worst)
        fixed_time = case["gap"] + case["serial"]
        # Never more than arrives until the first use: no launch is faster than its bytes.
        bandwidth = device.bandwidth * assumed.MEMORY_SHARE.value(worst, device.target)
        rest = case | {"memory": case["memory"] - min(early / bandwidth, fixed_time)}
        longest = max(time for key, time in rest.items() if key not in ("gap", "serial"))
        cases.append(case)
        ends.append(fixed_time + longest + (case["turns"] if worst else 0.0))
    parts = {key: Range(*(case[key] for case in cases)) for key in cases[0]}
    streams = {key: part for key, part in parts.items() if key not in ("gap", "serial")}
    fixed, each = parts["gap"] + parts["serial"], Range(*ends)
    bound = max(streams, key=lambda key: streams[key].middle)
    if fixed.middle > streams[bound].middle:
        bound = "gap" if parts["gap"].middle > parts["serial"].middle else "serial"
    return Line(item, each, parts, item.streamed / device.bandwidth, bound)


def _early(item: Work, front: Work | None, found: Figures, device: Device, worst: bool) -> float:
    """Bytes that programs request while the launch in front still runs: those with room beside it."""
    if not device.chained or front is None:
        return 0.0
    figure, other = found.find(item.name, item.rows), found.find(front.name, front.rows)
    taken = front.active / (other.resident * device.units)
    free = max(1 - taken, 1 / other.resident)  # of a full SM, one program has ended
    per_unit = floor(free * figure.resident) if worst else free * figure.resident
    programs = min(item.active, per_unit * device.units)
    each = min(figure.in_flight, item.streamed / item.active) if item.features else item.streamed / item.active
    return programs * each


def _parts(
    item: Work, found: Figures, device: Device, workload: Workload, early: float, worst: bool
) -> dict[str, float]:
    """Seconds of each part of one launch. early: bytes on their way before it may begin."""
    size, target, figure = SIZES[workload.dtype], device.target, found.find(item.name, item.rows)
    latency = device.latency * assumed.LATENCY.value(worst, device.target)
    clock = device.clock * assumed.CLOCK.value(worst)
    occupancy = figure.resident * device.units
    if worst:  # whole waves, of programs that come to SMs one by one
        waves, per_unit = float(ceil(item.active / occupancy)), float(ceil(item.active / device.units))
    else:
        waves, per_unit = max(1.0, item.active / occupancy), max(1.0, item.active / device.units)
    trips, instructions = _per_program(item, figure, device)
    other = assumed.OTHER_FROM_MEMORY.value(worst) * item.other
    memory = (item.streamed + other) / (device.bandwidth * assumed.MEMORY_SHARE.value(worst, target))
    slow = max(trips, 1.0) / assumed.IN_FLIGHT.value(worst, target) if trips else 0.0
    flight = slow * latency * (waves + (1 if worst and item.active > occupancy else 0))
    # Of attentions all is fetched from L2: what their programs share is little.
    shared = 1 if worst or not item.features else min(figure.resident, ceil(item.active / device.units))
    cache = (item.moved + item.again / shared) / (device.cache_bandwidth * assumed.CACHE_SHARE.value(worst, target))
    operations = per_unit * device.units * _operations(item, figure, found, workload)
    return {
        "memory": memory,
        "flight": flight,
        "issue": per_unit * instructions / (device.issue * clock * assumed.ISSUE.value(worst, target)),
        "cache": cache,
        "compute": operations / (device.peak(size) * assumed.COMPUTE.value(worst)),
        "turns": _turns(item, occupancy, device, worst),
        "gap": _gap(item, device, workload, worst),
        "serial": _serial(item, device, early, worst),
    }


def _per_program(item: Work, figure: Figure, device: Device) -> tuple[float, float]:
    """Latencies that a program's loads of weights or of K and V take, 0 if unknown, and its warp instructions."""
    if not item.features:
        return float(item.name in counted.ATTENTIONS), figure.instructions * figure.warps
    bytes_of_program = figure.block * item.width * item.weight_size
    loads = bytes_of_program / (16 * device.warp_size)
    trips = bytes_of_program / figure.in_flight if figure.in_flight else 0.0
    return trips, loads * figure.instructions


def _operations(item: Work, figure: Figure, found: Figures, workload: Workload) -> float:
    """Count the operations of a program.

    Those on padding are included: rows of x, the group's 16 rows of a matrix instruction, and tokens of a split beyond
    the context.
    """
    decoder = workload.config.decoder
    if item.features:
        return 2 * found.bucket(item.rows) * figure.block * item.width
    if item.name not in counted.ATTENTIONS:
        return item.flops / item.active
    if item.name == "self_attention":
        group, dim = decoder.num_attention_heads // decoder.num_key_value_heads, decoder.head_dim
    else:
        group, dim = decoder.cross_num_attention_heads // decoder.cross_num_key_value_heads, decoder.cross_head_dim
    return 4 * (max(16, group) if SIZES[workload.dtype] == 2 else group) * item.split * dim


def _gap(item: Work, device: Device, workload: Workload, worst: bool) -> float:
    if device.target.startswith("gfx"):
        return assumed.AMD_GAP.value(worst)
    chained = device.chained and item.name not in ("embed", "sample")
    return (assumed.PDL_GAP if chained else assumed.GRAPH_GAP).value(worst, device.target)


def _cached(device: Device, worst: bool) -> float:
    """Seconds of a load that hits L2."""
    return device.latency * assumed.LATENCY.value(worst, device.target) * assumed.CACHED_LATENCY.value(worst)


def _turns(item: Work, occupancy: int, device: Device, worst: bool) -> float:
    if item.name not in counted.ATTENTIONS:
        return 0.0
    turns = item.programs / occupancy
    return (ceil(turns) if worst else turns) * _cached(device, worst)


def _serial(item: Work, device: Device, early: float, worst: bool) -> float:
    """Time that nothing else hides: loads that depend on loads, the end of a program, the bisections."""
    clocks = assumed.EPILOGUE.value(worst)
    if item.name == "sample":
        cached, trips, clocks = 2, 0, clocks + assumed.SAMPLING.value(worst, device.target)
    elif item.name == "embed":
        cached, trips = 2, 1
    elif item.features:  # x, and the first weights unless they are requested while the launch before still runs
        cached, trips = 1, 1 if not device.chained or (worst and not early) else 0
    else:  # to merge splits: their sums, the counter, the others' sums
        cached, trips = (3 if item.splits > 1 else 0), 1 if worst and not early else 0
    latency = device.latency * assumed.LATENCY.value(worst, device.target)
    return cached * _cached(device, worst) + trips * latency + clocks / (device.clock * assumed.CLOCK.value(worst))


def _notes(made: Prediction) -> list[str]:
    """Remarks for readers of these numbers, sentence by sentence."""
    device, workload, step = made.device, made.workload, made.workload.step
    notes = [made.figures.stand_in] if made.figures.stand_in else []
    if step.padded > workload.requests:
        notes.append(f"{workload.requests} requests run in the graph for {step.padded}: the others are padding")
    rows = {line.work.rows for line in made.lines if line.work.features}
    missing = sorted(
        rows_of
        for rows_of in rows
        if all(made.figures.bucket(rows_of) not in made.figures.lines[name] for name in counted.PROJECTIONS)
    )
    if missing:
        notes.append(f"nothing was compiled for {missing[0]} rows: figures of the next larger count stand in")
    if any(not made.figures.find(name, 1).in_flight for name in counted.PROJECTIONS):
        notes.append(f"the machine code of {made.figures.target} does not tell bytes in flight: taken to be enough")
    if made.streamed() < device.cache:
        notes.append("all that a step streams fits the cache: the ceiling of the memory's bandwidth is none here")
    decoder, default = workload.config.decoder, DiaConfig().decoder
    if (decoder.hidden_size, decoder.intermediate_size) != (default.hidden_size, default.intermediate_size):
        notes.append("figures of compiled code are those of Dia-1.6B's shapes")
    return notes
