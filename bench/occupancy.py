"""Room for the next launch of a decode step beside the one that runs, from the compiled code of both.

With programmatic dependent launch, programs of the next launch request their weights while this one still runs, if an
SM has registers, warps and shared memory left for them. Where it has not, the memory idles from one launch to the next.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine_code
from bench.machine_code import Code, Machine
from dia_fast.diagnostics.roofline import work
from dia_kernels.aot import Compiled

KNOWN = Path(__file__).with_name("occupancy.json")
CONTEXT, TEXT = 861, 200  # tokens that the attentions read: programs beyond them end at once
ROWS = (1, 2, 8)  # that are judged: steps of so few are bound by the time from one launch to the next
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Launch:
    """One launch of a step. programs: those that find something to do; residents: most on one SM.

    warps, registers, shared: of one program, as the hardware hands them out. early: bytes of weights, keys and values
    that a program requests before it waits for the launch in front, in registers or in shared memory.
    """

    name: str
    programs: int
    residents: int
    warps: int
    registers: int
    shared: int
    early: int
    triggers: bool
    waits: bool


@dataclass(frozen=True)
class Pair:
    """Two neighbours in a step.

    room: programs of the second that fit on the GPU beside the first; needed: one per SM, or all of them where they
    are fewer; in_flight: bytes per SM that those in the room request early.
    """

    first: str
    second: str
    room: int
    needed: int
    in_flight: float

    @property
    def name(self) -> str:
        return f"{self.first} -> {self.second}"


def launch(name: str, item: Compiled, code: Code, machine: Machine) -> Launch:
    """Return the figures of one launch as compiled."""
    warps = item.result.metadata.num_warps
    opcodes = [i.opcode for i in code.instructions]
    waits = opcodes.index("ACQBULK") if "ACQBULK" in opcodes else 0
    early = sum(i.bits // 8 for i in code.instructions[:waits] if i.hint)
    return Launch(
        name=name,
        programs=live_programs(item),
        residents=machine_code.residents(code, machine, warps),
        warps=warps,
        registers=machine_code.registers_of_program(code, machine, warps),
        shared=machine_code.shared_of_program(code, machine),
        early=early * machine.lanes * warps,
        triggers="PREEXIT" in opcodes,
        waits="ACQBULK" in opcodes,
    )


def live_programs(item: Compiled) -> int:
    """Count the programs of a launch with work: of an attention, those within the context or the text."""
    programs = 1
    for extent in item.grid:
        programs *= extent
    tokens = {"_rope_attention": CONTEXT, "_cross_attention": TEXT}.get(item.kernel)
    if tokens is None:
        return programs
    return item.grid[0] * min(item.grid[1], -(-tokens // item.meta["SPLIT"]))


def step_launches(compiled: Sequence[Compiled], codes: Sequence[Code], machine: Machine) -> list[Launch]:
    """Return the launches of a step of one layer, by name.

    A kernel of somebody's own, under another name, has that of the launch in whose place it is; none are returned where
    that cannot be told, because it launches more or fewer. Raises ValueError for other launches of shipped kernels.
    """
    kernels = [item.kernel.removeprefix("_") for item in compiled]
    expected = [work.KERNELS[name] for name in work.LAUNCHES]
    own = set(kernels) - set(expected)
    pairs_of_names = zip(kernels, expected, strict=False)
    if len(kernels) == len(expected) and all(seen == due or seen in own for seen, due in pairs_of_names):
        return [launch(*each, machine) for each in zip(work.LAUNCHES, compiled, codes, strict=True)]
    if own:
        return []
    raise ValueError(f"a decode step launches {', '.join(kernels)}; expected those of {', '.join(work.LAUNCHES)}")


def pairs(launches: Sequence[Launch], machine: Machine) -> Iterator[Pair]:
    """Yield the neighbours of a step that can overlap; a layer's last launch has the next layer's first as one, too.

    The first one's programs lie evenly on the SMs. Where they come in several waves, one has ended on each: the next
    launch begins once the last of them has its place, and they do not end together.
    """
    by_name = {item.name: item for item in launches}
    names = [item.name for item in launches]
    if not names:
        return
    for first, second in [*zip(names, names[1:], strict=False), ("down", "qkv")]:
        one, two = by_name[first], by_name[second]
        if not (one.triggers and two.waits):
            continue
        if one.programs > one.residents * machine.units:
            counts = [(one.residents - 1, machine.units)]
        else:
            each, more = divmod(one.programs, machine.units)
            counts = [(each + 1, more), (each, machine.units - more)]
        room = min(two.programs, sum(fitting(one, count, two, machine) * units for count, units in counts))
        yield Pair(first, second, room, min(two.programs, machine.units), room * two.early / machine.units)


def fitting(one: Launch, count: int, two: Launch, machine: Machine) -> int:
    """Count the programs of `two` that fit on an SM beside `count` of `one`."""
    limits = [
        (machine.warps - count * one.warps) // two.warps,
        (machine.registers - count * one.registers) // two.registers,
        (machine.shared - count * one.shared) // max(1, two.shared),
        machine.programs - count,
    ]
    return max(0, min(limits))


@dataclass(frozen=True)
class Neighbours:
    """The pairs of one step as compiled for a target, dtype and number of rows."""

    target: str
    dtype: str
    rows: int
    pairs: tuple[Pair, ...]


def neighbours(compiled: Sequence[Compiled], codes: Sequence[Code], target: str, dtype: str, rows: int) -> Neighbours:
    """Return the pairs of a step of one layer."""
    machine = machine_code.MACHINES[target]
    return Neighbours(target, dtype, rows, tuple(pairs(step_launches(compiled, codes, machine), machine)))


def violations(found: Neighbours, recorded: Any = None) -> list[str]:
    """Return the crowded pairs that are not recorded, and the recorded ones that are not crowded, a sentence each.

    A pair is crowded if fewer programs of the second launch fit than needed. recorded: of `KNOWN`.
    """
    if found.rows not in ROWS or found.dtype not in DTYPES:
        return []
    if recorded is None:
        recorded = json.loads(KNOWN.read_text(encoding="utf-8"))
    known = set(recorded.get(found.target, {}).get(found.dtype, {}).get(str(found.rows), ()))
    crowded = {pair.name: pair for pair in found.pairs if pair.room < pair.needed}
    where = f"on {found.target}, {found.dtype}, {found.rows} rows"
    said = [
        f"{name} {where}: room for {pair.room} programs of the next launch, {pair.needed} needed"
        for name, pair in crowded.items()
        if name not in known
    ]
    return said + [
        f"{name} {where}: recorded as crowded in {KNOWN.name}, but there is room; remove it"
        for name in sorted(known - set(crowded))
    ]


def markdown(found: Iterable[Neighbours]) -> str:
    """Return a table: programs of the next launch that fit, of those needed, and KB per SM that they have requested."""
    lines = []
    for item in found:
        if item.pairs:
            lines += [f"## {item.target}, {item.dtype}, {item.rows} rows: room beside the launch in front", ""]
            lines += ["| launch | next | programs that fit | needed | KB in flight per SM |"]
            lines += ["|---|---|---:|---:|---:|"]
            lines += [
                f"| {pair.first} | {pair.second} | {pair.room} | {pair.needed} | {pair.in_flight / 1024:.0f} |"
                for pair in item.pairs
            ]
            lines.append("")
    return "\n".join(lines)
