"""Read a compiled kernel's machine code: SASS for NVIDIA, GCN assembly for AMD.

Written for kernels that stream weights. A load is one of weights when it carries the streaming hint (`.EF` in SASS,
`nt`, `slc` or `TH_LOAD_NT` in AMD's assembly); kernels/dia_kernels/triton/gemv.py gives it to nothing else. Triton
gives RDNA 3 no hint. What an asynchronous copy brings (`LDGSTS`, TMA) goes to shared memory without passing registers:
such copies are counted, and their bytes in flight cannot be told.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dia_fast.diagnostics.roofline.devices import DEVICES

MATRIX = re.compile(r"[HID]MMA|[HIQ]GMMA|UTC\w*MMA|v_mfma|v_smfmac|v_wmma|v_swmmac")
MULTIPLY_ADD = re.compile(r"v_(dual_)?fmac?_f32")
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP", "global_load_lds", "buffer_load_lds")  # that pass registers by


@dataclass(frozen=True)
class Machine:
    """Limits of a GPU that decide its bytes in flight, and the instructions it can issue meanwhile.

    units: SMs or CUs; bandwidth: bytes/s of memory; clock: Hz; lanes: of a warp; warps, registers (32-bit, per lane of
    a warp slot summed over the unit), shared (bytes), programs (thread blocks), per unit; issue: warp instructions per
    clock and unit. On CDNA a vector instruction of 64 lanes occupies its 16-lane SIMD for 4 clocks, so four SIMDs take
    one per clock; scalar instructions, loads and waits are issued beside them.
    """

    name: str
    units: int
    bandwidth: float
    clock: float
    lanes: int
    warps: int
    registers: int
    shared: int
    issue: float
    programs: int

    @property
    def slots_per_load(self) -> float:
        """Warp instructions a unit can issue while one 128-bit load of a whole warp arrives at full bandwidth."""
        return self.issue * self.clock / (self.bandwidth / self.units / (16 * self.lanes))


def _machine(key: str, warps: int, registers: int, shared: int, programs: int) -> Machine:
    """A GPU of the table of `dia-fast plan`, with the limits of occupancy that programming guides tell."""
    device = DEVICES[key]
    return Machine(
        device.name, device.units, device.bandwidth, device.clock, device.warp_size, warps, registers, shared,
        device.issue, programs,
    )  # fmt: skip


MACHINES = {
    "sm_80": _machine("a100", 64, 65536, 163 << 10, 32),
    "sm_86": _machine("3090", 48, 65536, 99 << 10, 16),
    "sm_89": _machine("4090", 48, 65536, 99 << 10, 24),
    "sm_90": _machine("h100", 64, 65536, 227 << 10, 32),
    "sm_100": _machine("b200", 64, 65536, 227 << 10, 32),
    "sm_120": _machine("5090", 48, 65536, 99 << 10, 24),
    "gfx942": _machine("mi300x", 32, 131072, 64 << 10, 32),
    "gfx1100": _machine("7900xtx", 64, 196608, 64 << 10, 32),
}


@dataclass(frozen=True)
class Instruction:
    """opcode with its modifiers; writes, reads: numbers of vector registers; hint: streaming; waits: vmcnt, or -1.

    load: the kind of a load from global memory, such as `LDG`, or one of `COPIES`.
    """

    opcode: str
    writes: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    bits: int = 0  # of a load from global memory, per lane
    hint: bool = False
    waits: int = -1
    load: str = ""


@dataclass(frozen=True)
class Code:
    """One kernel: its instructions in address order, registers per lane, spilled bytes or registers, shared bytes."""

    instructions: tuple[Instruction, ...]
    registers: int
    spills: int
    shared: int

    def weight_loads(self) -> list[Instruction]:
        """Those with the hint; where there is none (RDNA 3), all up to the last product, activations too.

        Products are matrix instructions, in float32 there multiply-adds.
        """
        hinted = [i for i in self.instructions if i.bits and i.hint]
        kind = MATRIX if self.matrix() else MULTIPLY_ADD
        products = [n for n, i in enumerate(self.instructions) if kind.match(i.opcode)]
        if hinted or not products:
            return hinted
        return [i for i in self.instructions[: products[-1]] if i.bits]

    def matrix(self) -> Counter[str]:
        """Matrix instructions by mnemonic."""
        return Counter(i.opcode for i in self.instructions if MATRIX.match(i.opcode))

    def loads(self) -> Counter[str]:
        """Loads from global memory and copies to shared memory by kind."""
        return Counter(i.load for i in self.instructions if i.load)

    def per_load(self, machine: Machine) -> float:
        """Instructions of the whole kernel, start and end included, per load of weights; on CDNA vector ones only.

        Not those of a main loop only: gemv.py has none, and compilers move work beyond its last product.
        """
        counted = [i for i in self.instructions if machine.lanes == 32 or i.opcode.startswith("v_")]
        return len(counted) / max(1, len(self.weight_loads()))


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M)
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDE_READS = (("HMMA.16816", (4, 2, 4)), ("HMMA.1688", (2, 1, 4)))


def _parse_sass_line(opcode: str, operands: str) -> Instruction:
    parts = operands.split(",")
    registers = [[int(n) for n in _REGISTER.findall(part)] for part in parts]
    kind = opcode.partition(".")[0]
    if kind in COPIES:
        return Instruction(opcode, (), tuple(n for part in registers for n in part), load=kind)
    if kind == "LDG":
        bits = next((int(n) for n in re.findall(r"\.(\d+)", opcode) if n in ("64", "128", "256")), 32)
        first = registers[0][0] if registers[0] else 0
        return Instruction(opcode, tuple(range(first, first + bits // 32)), (), bits, ".EF" in opcode, load=kind)
    sizes = next((sizes for name, sizes in _WIDE_READS if opcode.startswith(name)), (1,) * 8)
    stores = opcode.startswith(("ST", "RED", "BAR", "BRA", "EXIT"))
    sources = registers if stores else registers[1:]
    if opcode.startswith(("STS.128", "STG.E.128", "ST.128")):
        sizes = (1, 4, 4)
    reads = {n + i for part, size in zip(sources, (*sizes, *(1,) * 8), strict=False) for n in part for i in range(size)}
    return Instruction(opcode, () if stores else tuple(registers[0][:1]), tuple(reads))


_AMD_RANGE = re.compile(r"\bv(?:(\d+)|\[(\d+):(\d+)\])")
_AMD_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64, "b96": 96, "b128": 128}


def _amd_registers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for one, first, last in _AMD_RANGE.findall(text):
        found += [int(one)] if one else range(int(first), int(last) + 1)
    return tuple(found)


def _parse_amd_line(opcode: str, operands: str) -> Instruction:
    counter = re.search(r"vmcnt\((\d+)\)", operands) if opcode == "s_waitcnt" else None
    if counter or opcode == "s_wait_loadcnt":
        return Instruction(opcode, waits=int(counter.group(1)) if counter else int(operands.strip(), 0))
    if opcode.startswith(("global_load", "buffer_load")):
        kind = "_".join(opcode.split("_")[:2])
        if "_lds_" in opcode or re.search(r"\blds\b", operands):
            return Instruction(opcode, (), _amd_registers(operands), load=f"{kind}_lds")
        target, _, rest = operands.partition(",")
        bits = _AMD_BITS.get(opcode.rpartition("_")[2], 16)
        hint = re.search(r"\bnt\b|\bslc\b|TH_LOAD_NT", rest) is not None
        return Instruction(opcode, _amd_registers(target), _amd_registers(rest), bits, hint, load=kind)
    target, _, rest = operands.partition(",")
    return Instruction(opcode, _amd_registers(target), _amd_registers(rest))


def read_amd(assembly: str, shared: int) -> Code:
    """From `compiled.asm["amdgcn"]` and `compiled.metadata.shared`."""
    body = assembly[: assembly.find(".Lfunc_end")]
    lines = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\b[ \t]*([^\n;]*)", body, re.M)
    facts = {
        key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly)
    }
    spills = facts["vgpr_spill_count"] + facts["sgpr_spill_count"]
    return Code(tuple(_parse_amd_line(*line) for line in lines), facts["vgpr_count"], spills, shared)


def read_sass(cubin: bytes, shared: int, tools: Path) -> Code:
    """From `compiled.asm["cubin"]`; tools: the folder with cuobjdump and nvdisasm, `triton/backends/nvidia/bin`.

    Spills show as STACK: LOCAL stays 0. Trailing padding (NOP, and the branch to itself) is left out.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [subprocess.run([tools / name, flag, file.name], capture_output=True, text=True, check=True).stdout
               for name, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))]  # fmt: skip
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run[1])
    assert usage, f"cuobjdump says nothing of registers: {run[1]}"
    code = [_parse_sass_line(*match) for match in _SASS.findall(run[0])]
    return Code(tuple(i for i in code if i.opcode != "NOP"), int(usage[1]), int(usage[2]), shared)


def outstanding_loads(code: Code) -> tuple[int, int]:
    """Most loads of weights a warp has on their way at once, and the fewest between that moment and its last load.

    A walk through the code in address order (kernels of gemv.py have no loops). A load is on its way until something
    reads its registers or, on AMD, a wait counts it out: counters there go down in the order of issue, so waiting for a
    younger load waits for all older ones.
    """
    flying: list[Instruction] = []
    ordered = any(i.waits >= 0 for i in code.instructions)
    owner: dict[int, Instruction] = {}
    history = []
    left = len(code.weight_loads())
    for i in code.instructions:
        if i.waits >= 0 and len(flying) > i.waits:
            flying = flying[len(flying) - i.waits :]
        if not ordered:
            arrived = {id(owner.pop(register)) for register in i.reads if register in owner}
            flying = [load for load in flying if id(load) not in arrived]
        for register in i.writes:
            owner.pop(register, None)
        if i.bits:
            flying.append(i)
            owner |= dict.fromkeys(i.writes, i)
            left -= i.hint
        history.append((sum(load.hint for load in flying), left))
    most = max(count for count, _ in history)
    peak = next(n for n, (count, _) in enumerate(history) if count == most)
    return most, min((count for count, rest in history[peak:] if rest), default=most)


def residents(code: Code, machine: Machine, warps: int) -> int:
    """Programs of `warps` warps that one SM or CU holds at a time."""
    limits = [machine.programs, machine.warps // warps, machine.registers // registers_of_program(code, machine, warps)]
    if code.shared:
        limits.append(machine.shared // shared_of_program(code, machine))
    return min(limits)


def registers_of_program(code: Code, machine: Machine, warps: int) -> int:
    """Return the registers that one program takes, as the hardware hands them out."""
    grain = 8 if _nvidia(machine) or machine.lanes == 64 else 24
    return -(-code.registers // grain) * grain * machine.lanes * warps


def shared_of_program(code: Code, machine: Machine) -> int:
    """Return the bytes of shared memory that one program takes, with what NVIDIA's driver keeps in each."""
    return code.shared + 1024 * _nvidia(machine)


def _nvidia(machine: Machine) -> bool:
    return machine.name.startswith("NVIDIA")


def bytes_in_flight(code: Code, machine: Machine, warps: int, programs: int) -> tuple[float, float]:
    """Bytes of weights on their way per SM or CU, most and fewest (`outstanding_loads`), averaged over all of them."""
    resident = min(residents(code, machine, warps), programs / machine.units)
    most, fewest = outstanding_loads(code)
    return most * 16 * machine.lanes * warps * resident, fewest * 16 * machine.lanes * warps * resident


def issue_share(code: Code, machine: Machine) -> float:
    """Share of a unit's issue slots that the kernel needs to keep up with the memory's full bandwidth."""
    return code.per_load(machine) / machine.slots_per_load
