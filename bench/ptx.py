"""Runs the PTX of one program on numpy: what a kernel compiled for an NVIDIA GPU computes, with no GPU.

Made for the projections of kernels/dia_kernels/triton/gemv.py, whose code is straight: no branches, no loops. All
threads of the program take one instruction at a time, each register an array over threads. What it does not know raises
NotImplementedError.

Arithmetic is that of the instructions, with these liberties, none of which depends on a program's other rows: a fused
multiply-add is rounded to float64 before it is rounded to float32; a matrix instruction adds its products one by one
in float32, in the order of their columns (hardware's order is not documented); `rsqrt`, `ex2` and `div.full` are
rounded correctly. Not covered: what ptxas makes of the PTX, time, and barriers, which threads in step never need.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[Any]
Read = Callable[[Bits], Bits]  # byte offsets into a buffer -> the 16-bit words there

SHARED = 256 << 10
BUFFER = 1 << 40  # bytes of address space per buffer
_SPACES = {"global": False, "shared": True, "shared::cta": True}  # Triton 3.8 spells out that its own CTA's is meant
_UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
_STATEMENT = re.compile(r"^\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);", re.M)
_IGNORED = ("bar.sync", "griddepcontrol", "createpolicy", "ret", "prefetch", "fence")


def _split(text: str) -> list[str]:
    """Operands; those in braces stay together."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


class Program:
    """One program: its threads' registers, its shared memory, and what it wrote."""

    def __init__(self, program: int, threads: int, parameters: Sequence[int], buffers: Mapping[int, Read]) -> None:
        """parameters: integers, or addresses; buffers: what lies at each multiple of `BUFFER`, by that multiple."""
        self.threads, self.parameters, self.buffers = threads, parameters, buffers
        self.registers: dict[str, Bits] = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ctaid.x": np.full(threads, program, np.uint32),
            "%nctaid.z": np.ones(threads, np.uint32),
            "global_smem": np.zeros(threads, np.uint32),
        }
        self.shared = np.full(SHARED // 2, 0xFFFF, np.uint16)
        self.written: dict[int, int] = {}  # address -> 16-bit word
        self.lane = np.arange(threads) % 32

    def run(self, ptx: str) -> "Program":
        body = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
        body = body[body.index("\n{") + 2 :]
        for negated, guard, opcode, operands in _STATEMENT.findall(body):
            if opcode.startswith(_IGNORED):
                continue
            active = np.ones(self.threads, bool)
            if guard:
                active = self.registers[guard] ^ bool(negated)
            self.step(opcode, _split(operands), active)
        return self

    def get(self, operand: str, bits: int, signed: bool = False) -> Bits:
        """Return an operand of every thread as integers of `bits` bits."""
        if operand in self.registers:
            found = self.registers[operand]
        elif operand.startswith("0f"):
            found = np.full(self.threads, int(operand[2:], 16), np.uint32)
        elif operand.startswith("%") or not re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
            raise NotImplementedError(f"operand {operand}")
        else:
            found = np.full(self.threads, int(operand, 0) % (1 << bits), _UNSIGNED[bits])
        if found.dtype == bool:
            return found
        found = found.astype(_UNSIGNED[bits])
        return found.view(f"i{bits // 8}") if signed else found

    def put(self, name: str, value: Bits, active: Bits) -> None:
        if not active.all():
            value = np.where(active, value, self.registers.get(name, ~np.zeros_like(value)))  # else poison
        self.registers[name] = value

    def floats(self, operand: str, kind: str) -> Bits:
        """Return an operand as float32. kind: f32, f16 or bf16; a pair (f16x2) has its halves along the last axis."""
        if kind == "f32x2":
            return self.get(operand, 64).view(np.float32).reshape(self.threads, 2)
        if kind.endswith("x2"):
            return _widen(self.get(operand, 32).view(np.uint16).reshape(self.threads, 2), kind[:-2])
        return self.get(operand, 32).view(np.float32) if kind == "f32" else _widen(self.get(operand, 16), kind)

    def step(self, opcode: str, operands: list[str], active: Bits) -> None:
        parts = opcode.split(".")
        name, kind = parts[0], parts[-1]
        if name in ("ld", "st"):
            self.access(name == "st", parts, operands, active)
        elif name == "mov":
            self.move(operands, kind, active)
        elif name in ("ldmatrix", "stmatrix"):
            self.matrix(name == "stmatrix", parts, operands)
        elif name == "mma":
            self.mma(opcode, operands)
        elif name == "shfl":
            self.shuffle(parts[2], operands)
        elif name == "cvt" and ("f" in parts[-1] or "f" in parts[-2]):
            self.convert(parts, operands, active)
        elif name == "selp":
            values = (self.get(operand, int(kind[1:])) for operand in operands[1:3])
            self.put(operands[0], np.where(self.registers[operands[3]], *values), active)
        elif "f" in kind:
            self.put(operands[0], self.arithmetic(name, parts, operands), active)
        else:
            self.put(operands[0], self.integer(name, parts, operands), active)

    def arithmetic(self, name: str, parts: list[str], operands: list[str]) -> Bits:
        kind = parts[-1]
        if name == "setp":
            return _float_comparison(parts[1], *(self.floats(operand, kind) for operand in operands[1:3]))
        if name == "redux":
            fold = {"max": np.fmax, "min": np.fmin}[parts[2]]
            folded = fold.reduce(self.floats(operands[1], kind).reshape(-1, 32), 1)
            return np.repeat(folded.astype(np.float32).view(np.uint32), 32)
        if parts[-2:] == ["f32", "bf16"]:  # float32 + bf16
            kind, values = "f32", [self.floats(operands[1], "bf16"), self.floats(operands[2], "f32")]
        else:
            values = [self.floats(operand, kind) for operand in operands[1:]]
        a, b, c = (3 * [value.astype(np.float64) for value in values])[:3]
        functions: dict[str, Callable[[], Any]] = {
            "fma": lambda: a * b + c, "mul": lambda: a * b, "add": lambda: a + b, "sub": lambda: a - b,
            "div": lambda: a / b, "neg": lambda: -a, "rsqrt": lambda: 1 / np.sqrt(a), "ex2": lambda: np.exp2(a),
            "max": lambda: np.fmax(a, b), "min": lambda: np.fmin(a, b),
        }  # fmt: skip
        if name not in functions:
            raise NotImplementedError(".".join(parts))
        with np.errstate(all="ignore"):
            return _narrow(functions[name](), kind)

    def integer(self, name: str, parts: list[str], operands: list[str]) -> Bits:
        kind = parts[-1]
        if kind == "pred":
            left, right = (self.registers[operand] for operand in operands[1:3])
            return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name](left, right)
        bits, signed = int(kind[1:]), kind[0] == "s"
        if name == "redux":
            sums = self.get(operands[1], bits).reshape(-1, 32).sum(1, dtype=np.uint32)
            return np.repeat(sums, 32)
        if name == "popc":
            return np.bitwise_count(self.get(operands[1], bits)).astype(np.uint32)
        if name == "mul" and "hi" in parts:
            wide = [self.get(o, bits, signed).astype(np.int64 if signed else np.uint64) for o in operands[1:3]]
            return (wide[0] * wide[1] >> wide[0].dtype.type(32)).astype(np.uint32)
        if name == "cvt":
            to = parts[-2]
            return self.get(operands[1], bits, signed).astype(f"{to[0]}{int(to[1:]) // 8}".replace("s", "i"))
        if "wide" in parts:
            product = np.multiply(*(self.get(o, bits, signed).astype(np.int64) for o in operands[1:3]))
            return (product + (self.get(operands[3], 64, True) if name == "mad" else 0)).astype(_UNSIGNED[2 * bits])
        a, b, c = (3 * [self.get(operand, bits, signed) for operand in operands[1:]])[:3]
        if name == "setp":
            return {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                    "ge": np.greater_equal}[parts[1]](a, b)  # fmt: skip
        functions: dict[str, Callable[[], Any]] = {
            "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "mad": lambda: a * b + c,
            "and": lambda: a & b, "or": lambda: a | b, "xor": lambda: a ^ b, "not": lambda: ~a, "neg": lambda: -a,
            "shl": lambda: a << b.astype(a.dtype), "shr": lambda: a >> b.astype(a.dtype),
            "min": lambda: np.minimum(a, b), "max": lambda: np.maximum(a, b),
            "bfe": lambda: _field(self.get(operands[1], bits), int(operands[2]), int(operands[3]), signed),
        }  # fmt: skip
        if name == "prmt":
            return _permuted(a, b, int(operands[3], 0))
        if name not in functions:
            raise NotImplementedError(".".join(parts))
        with np.errstate(over="ignore"):
            return functions[name]().astype(_UNSIGNED[bits])

    def move(self, operands: list[str], kind: str, active: Bits) -> None:
        target, source = operands
        if target.startswith("{"):  # unpack
            names = _names(target)
            part = int(kind[1:]) // len(names)
            pieces = self.get(source, int(kind[1:])).view(_UNSIGNED[part]).reshape(self.threads, len(names))
            for n, name in enumerate(names):
                self.put(name, pieces[:, n].copy(), active)
        elif source.startswith("{"):  # pack
            names = _names(source)
            part = int(kind[1:]) // len(names)
            poison = np.full(self.threads, -1, np.int64).astype(_UNSIGNED[part])  # of a register that nothing defines
            pieces = np.stack([self.get(n, part) if n in self.registers or n[0] != "%" else poison for n in names], 1)
            self.put(target, np.ascontiguousarray(pieces).view(_UNSIGNED[int(kind[1:])])[:, 0], active)
        elif kind == "pred":
            self.put(target, np.full(self.threads, source != "0"), active)
        else:
            self.put(target, self.get(source, int(kind[1:])), active)

    def convert(self, parts: list[str], operands: list[str], active: Bits) -> None:
        to, source = parts[-2:]
        if "f" not in source:
            signed = self.get(operands[1], int(source[1:]), source[0] == "s")
            self.put(operands[0], signed.astype(np.float32).view(np.uint32), active)
        elif "f" not in to:
            whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor}[parts[1]](self.floats(operands[1], source))
            self.put(operands[0], whole.astype(f"i{int(to[1:]) // 8}").view(_UNSIGNED[int(to[1:])]), active)
        elif "rmi" in parts:
            self.put(operands[0], np.floor(self.floats(operands[1], source)).view(np.uint32), active)
        elif to.endswith("x2"):  # the first operand becomes the upper half
            pair = np.stack([self.floats(operand, source) for operand in operands[:0:-1]], 1)
            self.put(operands[0], _narrow(pair.astype(np.float64), to), active)
        else:
            self.put(operands[0], _narrow(self.floats(operands[1], source).astype(np.float64), to), active)

    def shuffle(self, mode: str, operands: list[str]) -> None:
        value, argument = self.get(operands[1], 32), self.get(operands[2], 32).astype(np.int64)
        if (mode, operands[3]) not in (("bfly", "31"), ("idx", "31"), ("up", "0")):
            raise NotImplementedError(f"shfl.sync.{mode} with {operands[3]}")
        source = self.lane ^ argument if mode == "bfly" else argument % 32
        if mode == "up":
            source = np.where(self.lane >= argument, self.lane - argument, self.lane)
        self.put(operands[0], value[np.arange(self.threads) // 32 * 32 + source], np.ones(self.threads, bool))

    def access(self, store: bool, parts: list[str], operands: list[str], active: Bits) -> None:
        bits = int(parts[-1][1:])
        if parts[1] == "param":
            index = int(re.findall(r"_param_(\d+)", operands[1])[0])
            self.put(operands[0], np.full(self.threads, self.parameters[index], _UNSIGNED[bits]), active)
            return
        address = operands[0 if store else 1].strip("[] ")
        base, _, offset = (part.strip() for part in address.partition("+"))
        if parts[1] not in _SPACES:
            raise NotImplementedError(f"{'.'.join(parts)}: state space {parts[1]}")
        shared = _SPACES[parts[1]]
        at = self.get(base, 32 if shared else 64).astype(np.int64) + int(offset or 0)
        words = bits // 16
        for n, name in enumerate(_names(operands[1 if store else 0])):
            here = at[active, None] + n * bits // 8 + 2 * np.arange(words)
            if store:
                value = self.get(name, bits)[active].copy().view(np.uint16).reshape(-1, words)
                if shared:
                    self.shared[here // 2] = value
                else:
                    self.written.update(zip(here.ravel().tolist(), value.ravel().tolist(), strict=True))
                continue
            loaded = np.zeros((self.threads, words), np.uint16)
            loaded[active] = self.shared[here // 2] if shared else self.read(here)
            self.put(name, loaded.view(_UNSIGNED[bits])[:, 0], active)

    def read(self, addresses: Bits) -> Bits:
        if not addresses.size:
            return np.empty(addresses.shape, np.uint16)
        buffer = addresses.flat[0] // BUFFER
        return self.buffers[buffer](addresses - buffer * BUFFER)

    def matrix(self, store: bool, parts: list[str], operands: list[str]) -> None:
        """8 x 8 tiles of 16-bit words between registers and shared memory; lanes 8 n to 8 n + 7 hold tile n's rows."""
        address = operands[0 if store else 1].strip("[] ")
        base, _, offset = (part.strip() for part in address.partition("+"))
        at = (self.get(base, 32).astype(np.int64) + int(offset or 0)).reshape(-1, 32) // 2
        row, column = np.arange(32) // 4, 2 * (np.arange(32) % 4)
        for n, name in enumerate(_names(operands[1 if store else 0])):
            rows = at[:, 8 * n : 8 * n + 8]
            halves = [rows[:, column + i] + row if "trans" in parts else rows[:, row] + column + i for i in (0, 1)]
            where = np.stack(halves, -1).reshape(self.threads, 2)
            if store:
                self.shared[where] = self.get(name, 32).view(np.uint16).reshape(-1, 2)
            else:
                value = np.ascontiguousarray(self.shared[where]).view(np.uint32)[:, 0]
                self.put(name, value, np.ones(self.threads, bool))

    def mma(self, opcode: str, operands: list[str]) -> None:
        found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", opcode)
        if not found:
            raise NotImplementedError(opcode)
        d, a, b, c = (_names(operand) for operand in operands)
        warps = self.threads // 32
        pairs = {name: self.floats(name, found[1] + "x2").reshape(warps, 8, 4, 2) for name in (*a, *b)}
        # Registers of A: rows 0-7 and 8-15, then the upper half of the columns; lanes: 8 rows x 4 pairs of columns.
        left = np.zeros((warps, 16, 16), np.float32)
        right = np.zeros((warps, 16, 8), np.float32)
        for n, name in enumerate(a):
            left[:, n % 2 * 8 : n % 2 * 8 + 8, n // 2 * 8 : n // 2 * 8 + 8] = pairs[name].reshape(warps, 8, 8)
        for n, name in enumerate(b):
            right[:, 8 * n : 8 * n + 8] = pairs[name].reshape(warps, 8, 8).transpose(0, 2, 1)
        total = np.zeros((warps, 16, 8), np.float32)
        for n, name in enumerate(c):
            total[:, n // 2 * 8 : n // 2 * 8 + 8, n % 2 :: 2] = self.floats(name, "f32").reshape(warps, 8, 4)
        for k in range(16):
            total += left[:, :, k, None] * right[:, k, None, :]
        for n, name in enumerate(d):
            part = total[:, n // 2 * 8 : n // 2 * 8 + 8, n % 2 :: 2]
            self.put(name, np.ascontiguousarray(part).reshape(-1).view(np.uint32), np.ones(self.threads, bool))


def _float_comparison(relation: str, a: Bits, b: Bits) -> Bits:
    """Unordered relations end with u and hold for a NaN; `num` and `nan` ask for its absence and presence."""
    nan = np.isnan(a) | np.isnan(b)
    if relation in ("num", "nan"):
        return nan == (relation == "nan")
    ordered = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}[relation[:2]](a, b)  # fmt: skip
    return ordered | nan if relation.endswith("u") else ordered & ~nan


def _permuted(a: Bits, b: Bits, selector: int) -> Bits:
    """Four bytes of the eight in a and b, each chosen by four bits of the selector; none repeats its sign."""
    if selector & 0x8888:
        raise NotImplementedError(f"prmt with selector {selector:#x}")
    choices = np.stack([a, b], 1).astype(np.uint32).view(np.uint8).reshape(len(a), 8)
    chosen = choices[:, [selector >> 4 * n & 7 for n in range(4)]]
    return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]


def _field(value: Bits, first: int, length: int, signed: bool) -> Bits:
    """Bits `first` to `first + length - 1`, their highest taken as the sign or not."""
    field = (value >> first) & ((1 << length) - 1)
    top = 1 << (length - 1)
    return (field ^ top) - top if signed else field


def _widen(words: Bits, kind: str) -> Bits:
    if kind == "bf16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return np.ascontiguousarray(words).view(np.float16).astype(np.float32)
    raise NotImplementedError(f"numbers of type {kind}")


def _narrow(values: Bits, kind: str) -> Bits:
    """Round float64 once, to nearest even, and return the bits; a pair is joined along the last axis."""
    if kind == "f32":
        return np.asarray(values, np.float32).view(np.uint32)
    if kind == "f32x2":
        return np.ascontiguousarray(values.astype(np.float32)).view(np.uint64)[:, 0]
    if kind in ("f16", "f16x2"):
        words = values.astype(np.float16).view(np.uint16)
    elif kind in ("bf16", "bf16x2"):
        words = round_bf16(values)
    else:
        raise NotImplementedError(f"numbers of type {kind}")
    return np.ascontiguousarray(words).view(np.uint32)[:, 0] if kind.endswith("x2") else words


def round_bf16(values: Bits) -> Bits:
    """Finite float64 to the bits of bf16, to nearest even, in one rounding: float32 on the way is rounded to odd."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32).copy()
    wide = near.astype(np.float64)
    away = np.abs(wide) > np.abs(values)
    bits = np.where(away, bits - 1, bits)
    bits |= (wide != values).astype(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
