"""Run compiled kernels of a decode step in any order of warps, to find races and results that depend on it.

    python -m bench.ordering                         # small shapes, seconds; no GPU is needed
    python -m bench.ordering --table table.json      # the projections of 16 rows by a table of configs as well

`bench.tools.resident` runs the PTX of all programs of a launch together. Results are compared with the torch reference:
no further from it in float32 than twice the error of the reference in the kernel's dtype plus one rounding. Launches
that begin early must not touch what the launches in front may still write before they have waited for them, and some
program of each must wait. What a table of configs makes of a projection must have the bits that the default configs
make of it. The exit code is 1 if anything is wrong.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import ptx
from bench.tools.resident import Launch
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError, InputError
from dia_kernels import aot as ahead
from dia_kernels import reference
from dia_kernels import triton as kernels
from dia_kernels.launcher import read_table
from dia_kernels.triton.paged_attention import AttentionWorkspace, attention_workspace

TARGETS = tuple(target for target in ahead.TARGETS if target.startswith("sm_"))
DTYPE = torch.bfloat16
SCRATCH = ("partials", "stats")  # anything may be left in these
# A tile with fewer elements than the program has threads is loaded by several warps; one of them stores. The others may
# read what it has stored already, and drop it.
REPEATED = {"linear_residual with a constant": "residual unordered with another warp"}


@dataclass(frozen=True)
class Case:
    """One launch: call(ops, tensors) makes it. ready: tensors that no launch in front writes."""

    name: str
    tensors: dict[str, Tensor]
    call: Callable[[Any, dict[str, Tensor]], object]
    ready: Sequence[str]


def _attention(positions: Sequence[int], kind: str, kv_ready: bool) -> Case:
    rows, kv, group, dim, page, room = len(positions), 2, 4, 16, 16, 18 if kind == "cross" else 9
    t = {
        "k": torch.randn(rows * room, kv, page, dim).to(DTYPE),
        "v": torch.randn(rows * room, kv, page, dim).to(DTYPE),
        "table": torch.randperm(rows * room).to(torch.int32).view(rows, room).contiguous(),
        "lengths": torch.tensor(positions, dtype=torch.int32),
        "out": torch.full((rows, kv * group * dim), torch.nan, dtype=DTYPE),
    }
    t |= attention_workspace(rows, kv * group, dim, room * page, "cpu")._asdict()
    still = ("k", "v", "table", "lengths", "cos", "sin") if kv_ready else ("cos", "sin")
    label = f"{kind}{', kv_ready' if kv_ready else ''}{', all rows empty' if max(positions) <= 0 else ''}"
    if kind == "cross":
        t["q"] = torch.randn(rows, kv * group * dim).to(DTYPE)
        return Case(f"cross_attention{label[5:]}", t, lambda ops, t: ops.cross_attention(
            t["q"], t["k"], t["v"], t["table"], t["lengths"], t["out"], _workspace(t), kv_ready), still)  # fmt: skip
    angle = torch.rand(room * page, dim // 2) * 6
    t |= {"qkv": torch.randn(rows, (group + 2) * kv * dim).to(DTYPE), "cos": angle.cos(), "sin": angle.sin()}
    return Case(f"rope_attention{label[4:]}", t, lambda ops, t: ops.rope_attention(
        t["qkv"], t["cos"], t["sin"], t["k"], t["v"], t["table"], t["lengths"], t["out"], _workspace(t), kv_ready,
    ), still)  # fmt: skip


def _workspace(t: Mapping[str, Tensor]) -> AttentionWorkspace:
    return AttentionWorkspace(t["partials"], t["stats"], t["arrivals"])


def projections(rows: int, hidden: int = 64, features: int = 48) -> Iterator[Case]:
    """Yield every projection. features: a multiple of six."""
    x, norm = torch.randn(rows, hidden).to(DTYPE), (1 + torch.rand(hidden) / 2).to(DTYPE)
    weight = (torch.randn(features, hidden) / 8).to(DTYPE)

    def out(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    t = {"x": x, "norm": norm, "weight": weight}
    still = ("norm", "weight", "constant")
    yield Case(f"rms_norm_linear, {rows} rows", t | {"out": out(rows, features)},
               lambda ops, t: ops.rms_norm_linear(t["x"], t["norm"], t["weight"], 1e-5, t["out"]), still)  # fmt: skip
    yield Case(f"rms_norm_glu, {rows} rows", t | {"out": out(rows, features // 2)},
               lambda ops, t: ops.rms_norm_glu(t["x"], t["norm"], t["weight"], 1e-5, t["out"]), still)  # fmt: skip
    logits = t | {"out": out(rows, 3, features // 3, dtype=torch.float32)}
    yield Case(f"codebook_logits, {rows} rows", logits,
               lambda ops, t: ops.codebook_logits(t["x"], t["norm"], t["weight"], 1e-5, t["out"]), still)  # fmt: skip
    residual = {"x": x, "weight": weight, "residual": torch.randn(rows, features).to(DTYPE)}
    yield Case(f"linear_residual, {rows} rows", residual,
               lambda ops, t: ops.linear_residual(t["x"], t["weight"], t["residual"]), still)  # fmt: skip
    more, constant = torch.randn(2 * rows, features).to(DTYPE), torch.randn(features).to(DTYPE)
    yield Case(f"linear_residual with a constant, {rows} rows", residual | {"residual": more, "constant": constant},
               lambda ops, t: ops.linear_residual(t["x"], t["weight"], t["residual"], t["constant"]),
               still)  # fmt: skip


def _ends() -> Iterator[Case]:
    """Return the launches that begin and end a step."""
    batch, channels, vocab, hidden, capacity = 2, 3, 24, 32, 8

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    t = {
        "sampled": torch.randint(vocab, (batch, channels), dtype=torch.int32),
        "prompt_codes": torch.randint(-1, vocab, (batch, 2, channels), dtype=torch.int32),
        "step": ints(1, 4), "first_step": ints(0, 1), "end_step": ints(6, 7), "eos_step": ints(-1, 3),
        "delay": ints(0, 1, 2),
        "table": torch.randn(channels * vocab, hidden).to(DTYPE),
        "codes": torch.zeros(batch, capacity, channels, dtype=torch.int32),
        "positions": ints(*[9] * 2 * batch), "finished": ints(0, 0),
        "x": torch.full((2 * batch, hidden), torch.nan).to(DTYPE),
    }  # fmt: skip
    yield Case("embed_codes", t, lambda ops, t: ops.embed_codes(**t, eos=20, pad=21), ())
    t = {
        "logits": torch.randn(2 * batch, channels, vocab) * 3, "step": ints(5, 6), "seed": torch.tensor([7, 2**40 + 1]),
        "guidance_scale": torch.tensor([3.0, 1.0]), "temperature": torch.tensor([1.3, 0.0]), "top_k": ints(5, 0),
        "top_p": torch.tensor([0.9, 1.0]), "out": torch.full((batch, channels), -1, dtype=torch.int32),
        "status": torch.zeros(batch, channels, dtype=torch.int32),
    }  # fmt: skip
    yield Case("sample", t, lambda ops, t: ops.sample(**t, eos=20), ())


def cases() -> Iterator[Case]:
    """Every kernel of a step: rows of several lengths, empty ones among them, and nothing but empty ones."""
    torch.manual_seed(0)
    for kind in ("rope", "cross"):
        for kv_ready in (True, False):
            yield _attention((5, 130, -1) if kind == "rope" else (5, 270, 0), kind, kv_ready)
        yield _attention((-1, -1) if kind == "rope" else (0, 0), kind, True)
    for rows in (2, 16):
        yield from projections(rows)
    yield from _ends()


def compiled_for(case: Case, target: str) -> ahead.Compiled:
    """Return the launch of a case, compiled; its tensors are on the meta device, in the order of `case.tensors`."""
    meta = {name: tensor.to("meta") for name, tensor in case.tensors.items()}
    with ahead.compiling(target) as compiled:
        case.call(kernels, meta)
    [found] = compiled
    names = {id(tensor): name for name, tensor in meta.items()}
    found.arguments.update(
        {key: names[id(value)] for key, value in found.arguments.items() if isinstance(value, Tensor)}
    )
    return found


def executed(
    case: Case, target: str, seed: int = 0, edit: Callable[[str], str] = lambda text: text
) -> tuple[dict[str, Tensor], Launch, bool]:
    """Run a case; return its tensors, the launch, and whether it begins early. edit: changes the PTX before that."""
    compiled = compiled_for(case, target)
    order = list(case.tensors)
    tensors = {name: tensor.clone() for name, tensor in case.tensors.items()}
    memory = {order.index(n) + 1: tensors[n].view(-1).view(torch.int16).numpy().view(np.uint16) for n in order}
    given = [v for v in compiled.arguments.values() if v is not None]
    parameters = [(order.index(v) + 1) * ptx.BUFFER if isinstance(v, str) else v for v in given]
    text = compiled.asm["ptx"]
    declared = len(set(re.findall(r"_param_\d+", text[: text.index("\n{")])))
    if declared != len(parameters) + 2:
        raise NotImplementedError(f"{case.name}: {declared} parameters in the code, {len(parameters)} given")
    x, y, z = (*compiled.grid, 1, 1)[:3]
    begins_early = "griddepcontrol.wait" in text
    front = [order.index(n) + 1 for n in order if n not in case.ready] if begins_early else []
    launch = Launch(
        edit(text), (x, y, z), compiled.result.metadata.num_warps, max(compiled.result.metadata.shared, 2),
        [*parameters, 0, 0], memory, {n + 1: name for n, name in enumerate(order)}, front, seed,
    )  # fmt: skip
    launch.run()
    return tensors, launch, begins_early


def problems(case: Case, target: str, seed: int = 0, edit: Callable[[str], str] = lambda text: text) -> list[str]:
    """Return the faults of a case, a sentence each. edit: changes the PTX before it is run."""
    tensors, launch, begins_early = executed(case, target, seed, edit)
    allowed = REPEATED.get(case.name.partition(",")[0])
    found = sorted(race for race in launch.races if not allowed or not race.endswith(allowed))
    if begins_early and not launch.waiting():
        found.append("no program waits for the launch in front")
    return [f"{case.name} on {target}: {problem}" for problem in found + _differences(case, tensors)]


def other_bits(case: Case, target: str, table: Path) -> list[str]:
    """Return the races of a projection under a table of configs, and results with other bits than by the default."""
    case = cancelling(case)
    expected = executed(case, target)[0]
    with configured(table):
        got, launch, _ = executed(case, target)
    allowed = REPEATED.get(case.name.partition(",")[0])
    found = sorted(race for race in launch.races if not allowed or not race.endswith(allowed))
    found += [
        f"{name} has other bits than by the default configs"
        for name, tensor in got.items()
        if not torch.equal(_bits(tensor), _bits(expected[name]))
    ]
    return [f"{case.name} on {target}: {problem}" for problem in found]


def cancelling(case: Case) -> Case:
    """Return a projection whose sums are exactly 0: all that comes out is rounding, which any other order changes."""
    t = {name: tensor.clone() for name, tensor in case.tensors.items()}
    half = t["x"].shape[1] // 2
    t["x"][:, half:] = -t["x"][:, :half]
    for name in {"norm", "weight"} & set(t):
        t[name][..., half:] = t[name][..., :half]
    if "residual" in t:
        t["residual"].zero_()
    return replace(case, tensors=t)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


@contextmanager
def configured(table: Path | None) -> Iterator[None]:
    """Let launches take their configs from a table, or with None from no table."""
    before = os.environ.pop("DIA_KERNELS_TABLE", None)
    os.environ.update({} if table is None else {"DIA_KERNELS_TABLE": str(table.absolute())})
    try:
        yield
    finally:
        os.environ.pop("DIA_KERNELS_TABLE", None)
        os.environ.update({} if before is None else {"DIA_KERNELS_TABLE": before})


def _differences(case: Case, got: Mapping[str, Tensor]) -> list[str]:
    wide = {n: t.float() if t.dtype == DTYPE else t.clone() for n, t in case.tensors.items()}
    plain = {n: t.clone() for n, t in case.tensors.items()}
    case.call(reference, wide)
    case.call(reference, plain)
    found = []
    for name, tensor in got.items():
        if name in SCRATCH:
            continue
        if not tensor.is_floating_point():
            wrong = not torch.equal(tensor, plain[name])
        else:
            error = (tensor.double() - wide[name].double()).abs().max()
            allowed = 2 * (plain[name].double() - wide[name].double()).abs().max()
            allowed += torch.finfo(DTYPE).eps / 2 * wide[name].double().abs().max()
            wrong = not error <= allowed
        if wrong:
            found.append(f"{name} is wrong")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.ordering", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=("sm_90",), choices=TARGETS, help="default: sm_90")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="orders to try (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="configs to run the projections by, beside the default ones")
    add_options(parser)
    options = parser.parse_args(argv)
    try:
        if options.table is not None:
            _check(options.table)
        results = Results(parser, options, argv)
    except DiaFastError as error:
        print(f"ordering: {error}", file=sys.stderr)
        return 2
    wrong = []
    for target in options.targets:
        for case in cases():
            found = sorted({p for seed in range(options.seeds) for p in problems(case, target, seed)})
            print(f"{case.name} on {target}: {'wrong' if found else 'right, no race'}", flush=True)
            results.add({"case": case.name, "target": target}, {"orders": options.seeds, "problems": len(found)})
            wrong += found
        for case in () if options.table is None else projections(16, 1040, 96):
            found = other_bits(case, target, options.table)
            print(f"{case.name} on {target} by the table: {'wrong' if found else 'the same bits, no race'}", flush=True)
            results.add({"case": f"{case.name}, by the table", "target": target}, {"problems": len(found)})
            wrong += found
    print(*wrong, f"{len(wrong)} problems", sep="\n", file=sys.stderr)
    return results.end(1 if wrong else 0)


def _check(path: Path) -> None:
    try:
        read_table(str(path))
    except ValueError as error:
        raise InputError(f"--table: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
