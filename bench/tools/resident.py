"""Runs the PTX of all programs of one launch at once, on numpy: warp by warp, in random order, looking for races.

Branches, barriers, atomics, asynchronous copies and `griddepcontrol` are executed. A warp takes some instructions, then
another one goes on, so that programs may wait for one another, as resident ones of a persistent kernel do. Every access
to shared memory, and to buffers that something writes, is checked by vector clocks: two accesses to one word, one of
them a write, need an order between them. A barrier orders the warps of a program, a release at a word those that
acquire it later, `griddepcontrol.wait` the launches in front with the warp that waits. A word that `cp.async` writes
belongs to the copy until `cp.async.wait_group` counts it out; the copy is carried out at once or only then, at random.

Threads of a warp count as ordered among each other. Two writes of the same value are no race. Not covered, besides
what `bench.ptx` names: stale first-level caches, and what ptxas makes of the PTX.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench import ptx
from bench.ptx import Bits

_LABEL = re.compile(r"(\$L\w+):\s*")
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$", re.S)
_SKIPPED = ("createpolicy", "prefetch", "fence", "bar.warp", "griddepcontrol.launch_dependents")


@dataclass(frozen=True)
class _Instruction:
    negated: bool
    guard: str
    opcode: str
    operands: list[str]


def parse(text: str) -> tuple[list[_Instruction], dict[str, int]]:
    """Return the instructions of the kernel in `text`, and the place of each label."""
    body = re.sub(r"//[^\n]*", "", text[text.index(".entry") :])
    body = re.split(r"\$L__func_end|\n\}", body[body.index("\n{") + 2 :])[0]
    body = re.sub(r"^\s*\.(reg|loc|file|pragma)[^\n]*\n", "", body, flags=re.M)
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in re.split(r"(?<=;)", body):
        line = line.strip()
        while found := _LABEL.match(line):
            labels[found[1]] = len(code)
            line = line[found.end() :]
        if not line or line == "}":
            continue
        statement = _STATEMENT.match(line)
        if statement is None:
            raise NotImplementedError(line)
        code.append(_Instruction(statement[1] == "!", statement[2] or "", statement[3], ptx._split(statement[4])))
    return code, labels


class _Words:
    """Last writer and last readers of each 16-bit word of a memory, by warp and that warp's clock.

    coming: words to which a copy is on its way.
    """

    def __init__(self, words: int, warps: int) -> None:
        self.coming = np.zeros(words, bool)
        self.writer = np.full(words, -1, np.int32)
        self.written = np.zeros(words, np.int32)
        self.read = np.zeros((warps, words), np.int32)

    def access(self, warp: int, clock: Bits, at: Bits, changed: Bits | None) -> Bits:
        """Words of `at` that somebody else accessed with nothing in between; changed: where a write changes them."""
        writer = self.writer[at]
        late = (writer >= 0) & (writer != warp) & (self.written[at] > clock[np.maximum(writer, 0)])
        late |= self.coming[at]
        if changed is None:
            self.read[warp, at] = clock[warp]
            return at[late]
        others = self.read[:, at] > clock[:, None]
        others[warp] = False
        late = (late & changed) | (others.any(0) & changed)
        self.writer[at], self.written[at] = warp, clock[warp]
        return at[late]


@dataclass(frozen=True)
class _Copy:
    """An asynchronous copy of a warp: words to write in shared memory, and memory and places that they come from.

    kept: of each thread, False for zeros in place of what it would read.
    """

    to: Bits
    memory: Bits
    at: Bits
    kept: Bits


class _Warp(ptx.Program):
    def __init__(self, grid: "Launch", program: "_Program", index: int, number: int) -> None:
        super().__init__(0, 32, grid.parameters, {})
        self.grid, self.program, self.number = grid, program, number
        self.place, self.over, self.waited = 0, False, False
        self.shared = program.shared
        self.groups: list[list[_Copy]] = [[]]  # of copies on their way; the last one is not closed yet
        self.clock = np.zeros(grid.clocks, np.int32)
        self.clock[number] = 1
        self.registers["%tid.x"] = np.arange(32, dtype=np.uint32) + 32 * index
        for axis, at, extent in zip("xyz", program.at, grid.extents, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(32, at, np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(32, extent, np.uint32)

    def advance(self) -> bool:
        """Execute one instruction; False if it has to wait for other warps."""
        i = self.grid.code[self.place]
        active = np.ones(32, bool) if not i.guard else self.registers[i.guard] ^ i.negated
        name = i.opcode.partition(".")[0]
        if name in ("bra", "ret"):
            if active.any() != active.all():
                raise NotImplementedError("a branch that the threads of a warp do not take together")
            if not active.any():
                self.place += 1
            elif name == "ret":
                self.over = True
            else:
                self.place = self.grid.labels[i.operands[0]]
            return True
        if i.opcode.startswith(("bar.sync", "barrier.sync")) and not self.program.arrive(self, i.operands):
            return False
        self.place += 1
        if i.opcode == "griddepcontrol.wait":
            self.waited = True
            self.clock[-1] = 1
        elif name == "atom":
            self.atomic(i.opcode, i.operands, active)
        elif i.opcode.startswith("cp.async"):
            self.copy(i.opcode, i.operands, active)
        elif not i.opcode.startswith(("bar", *_SKIPPED)):
            self.step(i.opcode, i.operands, active)
        return True

    def note(self, words: _Words | None, where: str, at: Bits, changed: Bits | None) -> None:
        """Report an access that nothing orders with an earlier one of somebody else."""
        if words is None or not at.size:
            return
        found = words.access(self.number, self.clock, at, changed)
        if found.size:
            word = int(found[0])
            writer = int(words.writer[word]) if changed is None else -1
            front = self.clock[-1] == 0 and (writer == self.grid.clocks - 1 or words.read[-1, word] > 0)
            self.grid.races.add(
                f"{'writes' if changed is not None else 'reads'} {where} "
                + ("before it waits for the launches in front" if front else "unordered with another warp")
            )

    def access(self, store: bool, parts: list[str], operands: list[str], active: Bits) -> None:
        if parts[1] == "param":
            return super().access(store, parts, operands, active)
        bits = int(parts[-1][1:])
        base, _, offset = (part.strip() for part in operands[0 if store else 1].strip("[] ").partition("+"))
        if parts[1] not in ptx._SPACES:
            raise NotImplementedError(f"{'.'.join(parts)}: state space {parts[1]}")
        shared = ptx._SPACES[parts[1]]
        at = self.get(base, 32 if shared else 64).astype(np.int64) + int(offset or 0)
        words = bits // 16
        for n, name in enumerate(ptx._names(operands[1 if store else 0])):
            here = at[active, None] + n * bits // 8 + 2 * np.arange(words)
            memory, where, noted, label = (
                (self.shared, here // 2, self.program.words, "shared memory") if shared else self.grid.find(here)
            )
            if store:
                value = self.get(name, bits)[active].copy().view(np.uint16).reshape(-1, words)
                self.note(noted, label, where.ravel(), (memory[where] != value).ravel())
                memory[where] = value
                continue
            self.note(noted, label, where.ravel(), None)
            if "acquire" in parts:
                self.acquire(at[active])
            loaded = np.zeros((32, words), np.uint16)
            loaded[active] = memory[where]
            self.put(name, loaded.view(ptx._UNSIGNED[bits])[:, 0], active)
        return None

    def matrix(self, store: bool, parts: list[str], operands: list[str]) -> None:
        self.note_matrix(store, parts, operands)
        super().matrix(store, parts, operands)

    def note_matrix(self, store: bool, parts: list[str], operands: list[str]) -> None:
        """As `note`, for the words of `ldmatrix` and `stmatrix`: 8 rows of 8 for each register."""
        rows = self.place_of(operands[0 if store else 1], 32) // 2
        names = ptx._names(operands[1 if store else 0])
        if not store:
            at = (rows[: 8 * len(names), None] + np.arange(8)).ravel()
            self.note(self.program.words, "shared memory", at, None)
            return
        if "trans" in parts:
            raise NotImplementedError(".".join(parts))
        row, column = np.arange(32) // 4, 2 * (np.arange(32) % 4)
        for n, name in enumerate(names):
            where = rows[8 * n + row][:, None] + column[:, None] + np.arange(2)
            value = self.get(name, 32).copy().view(np.uint16).reshape(-1, 2)
            self.note(self.program.words, "shared memory", where.ravel(), (self.shared[where] != value).ravel())

    def copy(self, opcode: str, operands: list[str], active: Bits) -> None:
        """Begin copies of 16 bytes or less a thread, close a group of them, or wait until so many groups are left."""
        if opcode == "cp.async.commit_group":
            self.groups.append([])
            return
        if opcode.startswith(("cp.async.wait_group", "cp.async.wait_all")):
            left = int(operands[0], 0) if operands else 0
            if not operands:
                self.groups.append([])
            while len(self.groups) - 1 > left:
                for item in self.groups.pop(0):
                    self.land(item)
                    words = self.program.words
                    words.coming[item.to] = False
                    words.writer[item.to], words.written[item.to] = self.number, self.clock[self.number]
            return
        if not re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::cache_hint)?", opcode):
            raise NotImplementedError(opcode)
        if not active.any():
            return
        to, source = self.place_of(operands[0], 32)[active], self.place_of(operands[1], 64)[active]
        size = int(operands[2], 0)
        kept = np.ones(to.size, bool)
        if len(operands) > 3 and "cache_hint" not in opcode:  # bytes that are read; the rest is zeros
            given = self.get(operands[3], 32)[active]
            if not np.isin(given, (0, size)).all():
                raise NotImplementedError(f"{opcode} of a part of {size} bytes")
            kept = given > 0
        steps = 2 * np.arange(size // 2)
        memory, at, noted, label = self.grid.find(source[kept, None] + steps)
        target = (to[:, None] + steps) // 2
        self.note(noted, label, at.ravel(), None)
        self.note(self.program.words, "shared memory", target.ravel(), np.ones(target.size, bool))
        self.program.words.coming[target] = True
        item = _Copy(target, memory, at, kept)
        if self.grid.random.random() < 0.5:
            self.land(item)
        self.groups[-1].append(item)

    def place_of(self, operand: str, bits: int) -> Bits:
        """Return the addresses that an operand in brackets names."""
        base, _, offset = (part.strip() for part in operand.strip("[] ").partition("+"))
        return self.get(base, bits).astype(np.int64) + int(offset or 0)

    def land(self, item: _Copy) -> None:
        """Carry a copy out."""
        values = np.zeros(item.to.shape, np.uint16)
        values[item.kept] = item.memory[item.at]
        self.shared[item.to] = values

    def release(self, at: int) -> None:
        """Let those who acquire this word later come behind all so far."""
        met = self.grid.met.setdefault(at, np.zeros_like(self.clock))
        np.maximum(met, self.clock, out=met)
        self.clock[self.number] += 1

    def acquire(self, places: Iterable[int]) -> None:
        """Come behind those who released these words."""
        for at in places:
            if (met := self.grid.met.get(int(at))) is not None:
                np.maximum(self.clock, met, out=self.clock)

    def atomic(self, opcode: str, operands: list[str], active: Bits) -> None:
        found = re.fullmatch(r"atom\.global(?:\.gpu)?\.(acq_rel|acquire|release|relaxed)\.add\.u32", opcode)
        if not found:
            raise NotImplementedError(opcode)
        old = np.zeros(32, np.uint32)
        at = self.place_of(operands[1], 64)
        for lane in np.flatnonzero(active):
            memory, where, noted, label = self.grid.find(at[lane] + 2 * np.arange(2))
            if found[1] in ("acq_rel", "acquire"):
                self.acquire([at[lane]])
            if found[1] in ("acq_rel", "release"):
                self.release(int(at[lane]))
            word = memory[where].view(np.uint32)
            old[lane] = word[0]
            memory[where] = (word + self.get(operands[2], 32)[lane : lane + 1]).astype(np.uint32).view(np.uint16)
            if self.clock[-1] == 0 and noted is not None and noted.writer[where[0]] == self.grid.clocks - 1:
                self.grid.races.add(f"adds to {label} before it waits for the launches in front")
        self.put(operands[0], old, active)


class _Program:
    def __init__(self, grid: "Launch", at: tuple[int, int, int], warps: int, first: int) -> None:
        self.at = at
        self.shared = np.full(ptx.SHARED // 2, 0xFFFF, np.uint16)
        self.words = _Words(grid.shared // 2, grid.clocks)
        self.warps = [_Warp(grid, self, index, first + index) for index in range(warps)]
        self.here: set[int] = set()
        self.passing: set[int] = set()

    def arrive(self, warp: _Warp, operands: Sequence[str]) -> bool:
        """Count a warp in at the barrier; return True if it may go on. Warps that are over count as there."""
        if operands != ["0"]:
            raise NotImplementedError(f"barrier {', '.join(operands)}")
        if warp.number in self.passing:
            self.passing.discard(warp.number)
            return True
        self.here.add(warp.number)
        alive = [other for other in self.warps if not other.over]
        if len(self.here) < len(alive):
            return False
        latest = np.max([other.clock for other in alive], 0)
        for other in alive:
            np.copyto(other.clock, latest)
            other.clock[other.number] += 1
        self.passing, self.here = self.here - {warp.number}, set()
        return True


@dataclass
class Launch:
    """One launch, all of whose programs are resident.

    text: PTX; extents: programs along x, y, z; shared: bytes; parameters: integers, or addresses, that is multiples of
    `ptx.BUFFER`; memory: 16-bit words at each of these multiples, changed in place; names: of the buffers; in_front:
    buffers that launches in front of this one may still read and write; budget: instructions of all warps together,
    after which programs that still run are taken to wait for ever.
    """

    text: str
    extents: tuple[int, int, int]
    warps: int
    shared: int
    parameters: Sequence[int]
    memory: Mapping[int, Bits]
    names: Mapping[int, str]
    in_front: Iterable[int]
    seed: int = 0
    budget: int = 3_000_000
    races: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.code, self.labels = parse(self.text)
        self.random = np.random.default_rng(self.seed)
        x, y, z = self.extents
        self.clocks = x * y * z * self.warps + 1  # the last one is that of the launches in front
        self.met: dict[int, Bits] = {}
        front = set(self.in_front)
        self.noted = {n: _Words(memory.size, self.clocks) for n, memory in self.memory.items()}
        for n in front:
            self.noted[n].writer[:], self.noted[n].written[:], self.noted[n].read[-1] = self.clocks - 1, 1, 1
        places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        self.programs = [_Program(self, at, self.warps, n * self.warps) for n, at in enumerate(places)]

    def find(self, addresses: Bits) -> tuple[Bits, Bits, _Words | None, str]:
        """Memory, places in it, record of its accesses, and name of the buffer. Raises IndexError for none."""
        if not addresses.size:
            n = next(iter(self.memory))
            return self.memory[n], addresses, self.noted[n], ""
        n = int(addresses.flat[0]) // ptx.BUFFER
        at = (addresses - n * ptx.BUFFER) // 2
        if n not in self.memory or at.min() < 0 or at.max() >= self.memory[n].size:
            raise IndexError(f"{self.names.get(n, 'nothing')}: word {at.min()} to {at.max()} is accessed")
        return self.memory[n], at, self.noted[n], self.names[n]

    def run(self) -> int:
        """Run it to its end; return the instructions that the warps executed. Raises RuntimeError for a deadlock."""
        random = self.random
        alive: list[Any] = [warp for program in self.programs for warp in program.warps]
        executed = idle = 0
        while alive:
            warp = alive[int(random.integers(len(alive)))]
            before = executed
            for _ in range(int(random.integers(1, 200))):
                if warp.over or not warp.advance():
                    break
                executed += 1
            if warp.over:
                alive.remove(warp)
            idle = idle + 1 if executed == before and not warp.over else 0
            if idle > 1000 + 100 * len(alive) or executed > self.budget:
                raise RuntimeError(f"{len(alive)} warps wait for ever, the first at {self.code[alive[0].place]}")
        return executed

    def waiting(self) -> int:
        """Count the programs that waited for the launch in front."""
        return sum(any(warp.waited for warp in program.warps) for program in self.programs)
