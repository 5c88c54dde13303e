"""The codegen gate: every kernel compiled for every GPU at the shapes of the 1.6B model, judged by `bench.codegen`.

Compiling needs a process without the interpreter, so each target is one.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: there is nothing to compile with", allow_module_level=True)

from bench.tools import results

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")

# Of neighbours in a step. The first launch and the last one take no part: they are launched behind one another.
PAIRS = [
    ("qkv", "self_attention"), ("self_attention", "o"), ("o", "cross_q"), ("cross_q", "cross_attention"),
    ("cross_attention", "cross_o"), ("cross_o", "gate_up"), ("gate_up", "down"), ("down", "heads"), ("down", "qkv"),
]  # fmt: skip


def in_a_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton compiles: this process may interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def compile_for(target: str, tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Run the report; the result and its lines."""
    report = tmp_path / "report.json"
    run = in_a_process(tmp_path, "-m", "bench.codegen", "--targets", target, "--json", str(report), *options)
    lines = results.flat(results.read(report)) if report.exists() else []
    return run, [line for line in lines if "kernel" in line]


@pytest.mark.parametrize("target", TARGETS)
def test_one_request_in_bf16(target: str, tmp_path: Path) -> None:
    run, lines = compile_for(target, tmp_path, "--rows", "2", "--dtypes", "bfloat16")
    assert run.returncode == 0, run.stderr
    kernels = {line["kernel"] for line in lines}
    assert kernels == {
        "embed_codes", "rms_norm_linear", "rope_attention", "linear_residual", "cross_attention", "rms_norm_glu",
        "codebook_logits", "sample", "rms_norm", "rope", "ragged_attention", "glu", "snake",
        "cross_attention of the first generation", "sample of the first generation",
    }  # fmt: skip
    assert not planned_with(tmp_path / "report.json", target), "make the figures of dia-fast plan anew"
    found = [line for line in results.flat(results.read(tmp_path / "report.json")) if "first" in line]
    chained = target in ("sm_90", "sm_100", "sm_120")
    assert [(pair["first"], pair["second"]) for pair in found] == (PAIRS if chained else [])
    assert ("room beside the launch in front" in run.stdout) == chained
    if chained:
        needed = {pair["second"]: pair["needed"] for pair in found}
        splits = {"sm_90": 1}.get(target, 2)  # of a text of 200 tokens: 256 a split, or what fits into registers
        assert needed["cross_attention"] == 16 * splits, "programs beyond the text end at once"


@pytest.mark.parametrize("target", TARGETS)
def test_one_request_by_weights_in_8_bits(target: str, tmp_path: Path) -> None:
    run, lines = compile_for(target, tmp_path, "--rows", "2", "--dtypes", "bfloat16", "--weights", "int8")
    assert run.returncode == 0, run.stderr
    projections = [line for line in lines if line["weights"] == "int8"]
    assert {line["kernel"] for line in projections} == {
        "rms_norm_linear", "linear_residual", "rms_norm_glu", "codebook_logits",
    }  # fmt: skip
    assert all(line["weight_bits"] == 128 and line["matrix"] for line in projections)
    if target in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert all(0 < line["issue"] < 0.6 for line in projections)


def planned_with(report: Path, target: str) -> list[str]:
    """Kernels that are larger than the figures of `dia-fast plan` say, which are those of the worst row count."""
    from dia_fast.diagnostics.roofline import figures, work

    found = results.read(report)
    known = json.loads((Path(figures.__file__).parent / figures.FILE).read_text())
    if found["versions"]["triton"] != known["triton"]:
        return []
    recorded = known["figures"][target]["bfloat16"]
    sizes = {line["kernel"]: line["instructions"] for line in results.flat(found) if line["rows"] and "kernel" in line}
    others = [name for name in work.LAUNCHES if name not in work.PROJECTIONS]
    return [name for name in others if sizes[work.KERNELS[name]] > recorded[name]["0"][-1]]


SAMPLE = """
import sys, torch
from bench.codegen import line
from dia_fast.diagnostics import launches
from dia_kernels import aot, launcher

def only_sample(run, kernel, grid, args, meta):
    if kernel.fn.__name__ == "_sample":
        run(kernel, grid, *args, **meta)

for rows in (8, 64):
    with aot.compiling(sys.argv[1]) as compiled, launcher.listening(only_sample):
        launches.decode(rows, torch.bfloat16)
    assert line(compiled[0], sys.argv[1], "bfloat16", rows).spills == 0, rows
"""


def test_sample_does_not_spill_with_many_requests(tmp_path: Path) -> None:
    """On sm_100, whose compiler stops at 128 registers of a thread there."""
    run = in_a_process(tmp_path, "-c", SAMPLE, "sm_100")
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_row_count_and_dtype(target: str, weights: str, tmp_path: Path) -> None:
    run, lines = compile_for(target, tmp_path, "--weights", weights)
    assert run.returncode == 0, run.stderr
    assert {(line["rows"], line["dtype"]) for line in lines} == {
        (rows, dtype)
        for rows in (0, 1, 2, 8, 32, 64)[weights == "int8" :]
        for dtype in ("bfloat16", "float16", "float32")
    }


OTHER_SIZES = """
import sys
import torch
from bench.codegen import line
from dia_kernels import aot as ahead
from dia_kernels import triton as kernels
from dia_kernels.triton.paged_attention import attention_workspace

target, dtype, dim = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])

def make(*shape, dtype=dtype):
    return torch.empty(shape, dtype=dtype, device="meta")

pages, table, ints = make(9, 4, 32, dim), make(2, 20, dtype=torch.int32), make(2, dtype=torch.int32)
angles = make(640, dim // 2, dtype=torch.float32)
workspace = attention_workspace(2, 16, dim, 640, "meta")
with ahead.compiling(target) as compiled:
    out = make(2, 16 * dim)
    kernels.rope_attention(make(2, 24 * dim), angles, angles, pages, pages, table, ints, out, workspace)
    kernels.cross_attention(make(2, 16 * dim), pages, pages, table, ints, out, workspace)
    kernels.ragged_attention(
        make(2, 16, dim), make(2, 4, dim), make(2, 4, dim), make(3, dtype=torch.int32), out, causal=True
    )
for item in compiled:
    print(item.kernel, line(item, target, sys.argv[2], 2).spills)
"""


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim"),
    [("sm_90", "bfloat16", 64)]
    + [
        pytest.param(target, dtype, head_dim, marks=pytest.mark.slow)
        for target in ("sm_80", "gfx942", "gfx1100")
        for dtype in ("bfloat16", "float32")
        for head_dim in (64, 96)
    ],
)
def test_attention_with_heads_of_another_size(target: str, dtype: str, head_dim: int, tmp_path: Path) -> None:
    run = in_a_process(tmp_path, "-c", OTHER_SIZES, target, dtype, str(head_dim))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["_rope_attention", "0", "_cross_attention", "0", "_ragged_attention", "0"]


FIRST_PRODUCT = """
import sys
import torch
from bench.codegen import read
from dia_kernels import aot as ahead
from dia_kernels import triton as kernels

x, norm, qkv, o, out, residual = (
    torch.empty(shape, dtype=torch.bfloat16, device="meta")
    for shape in ((2, 2048), (2048,), (3072, 2048), (2048, 2048), (2, 3072), (2, 2048))
)
with ahead.compiling(sys.argv[1]) as compiled:
    kernels.rms_norm_linear(x, norm, qkv, 1e-5, out)
    kernels.linear_residual(x, o, residual)
for item in compiled:
    code = read(item, sys.argv[1]).instructions
    first = next(n for n, i in enumerate(code) if i.opcode.startswith("HMMA"))
    print(sum(i.bits == 128 for i in code[:first]))
"""


def test_x_is_requested_before_the_first_product(tmp_path: Path) -> None:
    """All weights of a program, and two steps of x and the norm, two loads each, in o four of x: no load waits."""
    run = in_a_process(tmp_path, "-c", FIRST_PRODUCT, "sm_90")
    assert run.returncode == 0, run.stderr
    qkv, o = map(int, run.stdout.split())
    assert qkv >= 16 + 4 + 4
    assert o >= 16 + 8


def sound():
    from bench.codegen import Line

    return Line(
        target="sm_90", dtype="bfloat16", rows=2, kernel="rms_norm_glu", programs=1024, warps=8, registers=128,
        spills=0, shared=4096, occupancy=0.25, weight_bits=128, matrix={"HMMA.16816.F32.BF16": 32}, instructions=1000,
        in_flight=65536.0, issue=0.4,
    )  # fmt: skip


def test_a_sound_kernel_passes() -> None:
    from bench.codegen import violations

    assert violations(sound()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 8}, "spills 8"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"weight_bits": 64}, "64 bits wide"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"issue": 0.61}, "61% of the issue slots"),
        ({"in_flight": 20_000.0}, "KB of weights in flight"),
    ],
)
def test_each_defect_is_named(change: dict, message: str) -> None:
    from bench.codegen import violations

    found = violations(dataclasses.replace(sound(), **change))
    assert len(found) == 1
    assert message in found[0]
    assert "rms_norm_glu on sm_90, bfloat16, 2 rows" in found[0]


def test_float32_is_held_to_the_streaming_figures_for_few_rows() -> None:
    from bench.codegen import violations

    heavy = dataclasses.replace(sound(), dtype="float32", matrix={}, issue=0.9, rows=8)
    [found] = violations(heavy)
    assert "90% of the issue slots" in found
    assert violations(dataclasses.replace(heavy, rows=32)) == []


def test_row_counts_with_the_same_code_share_a_line_of_the_tables() -> None:
    from bench.codegen import markdown

    lines = [sound(), dataclasses.replace(sound(), rows=8), dataclasses.replace(sound(), rows=32, registers=200)]
    tables = markdown([*lines, dataclasses.replace(sound(), target="sm_80")])
    assert [line for line in tables.splitlines() if line.startswith("## ")] == [
        "## sm_90, bfloat16",
        "## sm_80, bfloat16",
    ]
    assert [line.split("|")[1].strip() for line in tables.splitlines() if "rms_norm_glu" in line] == ["2, 8", "32", "2"]


def test_the_summary_holds_the_worst() -> None:
    from bench.codegen import summary

    lines = [
        sound(),
        dataclasses.replace(sound(), rows=32, registers=200, occupancy=0.125, issue=0.55, in_flight=50.0 * 1024),
        dataclasses.replace(sound(), rows=64, issue=0.9, shared=9000),
        dataclasses.replace(sound(), dtype="float32", issue=0.58, in_flight=45.0 * 1024),
        dataclasses.replace(sound(), dtype="float32", rows=64, issue=3.0, in_flight=4.0 * 1024),
    ]
    *_, row = summary(lines).splitlines()
    assert row == "| sm_90 | rms_norm_glu | 5 | 200 | 0 | 9000 | 12% | 128 bit | 50 | 55% | 45 | 58% |"


def test_loads_without_a_hint_count_up_to_the_last_product() -> None:
    from bench.machine_code import Code, Instruction

    wide, narrow = Instruction("buffer_load_b128", bits=128), Instruction("buffer_load_b64", bits=64)
    product = Instruction("v_wmma_f32_16x16x16_bf16")
    assert Code((wide, narrow, product, narrow), 1, 0, 0).weight_loads() == [wide, narrow]
    hinted = Instruction("buffer_load_dwordx4", bits=128, hint=True)
    assert Code((narrow, hinted, product), 1, 0, 0).weight_loads() == [hinted]


OWN_PROJECTION = """
import sys
import torch, triton
import triton.language as tl
from bench.codegen import line, markdown, violations
from dia_kernels import aot, launcher

@triton.jit
def _own(x_ptr, weight_ptr, out_ptr, K: tl.constexpr):
    m, n, k = tl.arange(0, 16), tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, 64)
    total = tl.zeros([16, 64], tl.float32)
    for start in range(0, K, 64):
        x = tl.load(x_ptr + m[:, None] * K + start + k[None, :])
        total = tl.dot(x, tl.load(weight_ptr + n[None, :] * K + start + k[:, None]), total)
    tl.store(out_ptr + m[:, None] * 2048 + n[None, :], total.to(tl.bfloat16))

x, weight, out = (
    torch.empty(rows, 2048, dtype=torch.bfloat16, device="meta") for rows in (16, 2048, 16)
)
for stages in (1, 4):
    with aot.compiling(sys.argv[1]) as compiled:
        launcher.run(_own, (32,), x, weight, out, K=2048, num_warps=4, num_stages=stages)
    found = line(compiled[0], sys.argv[1], "bfloat16", 16)
    told = "n/a" in markdown([found])
    print(found.projection, sorted(found.loads), found.weight_bits, told, violations(found), sep="|")
"""


@pytest.mark.parametrize(("target", "plain"), [("sm_80", "LDG"), ("gfx942", "buffer_load")])
def test_of_asynchronous_copies_nothing_is_claimed(target: str, plain: str, tmp_path: Path) -> None:
    """A kernel of one's own, told by its argument: with loads through registers it is judged, with copies it is not."""
    file = tmp_path / "own.py"
    file.write_text(OWN_PROJECTION)
    run = in_a_process(tmp_path, str(file), target)
    assert run.returncode == 0, run.stderr
    direct, staged = (line.split("|") for line in run.stdout.splitlines())
    assert direct[0] == staged[0] == "True" and direct[1] == f"['{plain}']" and direct[2] != "0"
    if target == "sm_80":
        assert staged == ["True", "['LDGSTS']", "0", "True", "[]"]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("/*0a10*/ LDGSTS.E.BYPASS.128 [R13], desc[UR6][R2.64] ;", "LDGSTS"),
        ("/*0a10*/ @P0 UTMALDG.2D [UR8], [UR4], desc[UR6] ;", "UTMALDG"),
        ("/*0a10*/ LDG.E.128.EF R4, desc[UR6][R2.64] ;", "LDG"),
        ("\tbuffer_load_dword v1, s[0:3], 0 offen lds\n", "buffer_load_lds"),
        ("\tglobal_load_lds_dwordx4 v[2:3], off\n", "global_load_lds"),
        ("\tbuffer_load_dwordx4 v[0:3], v1, s[0:3], 0 offen nt\n", "buffer_load"),
        ("\tds_read_b128 v[0:3], v1\n", ""),
    ],
)
def test_loads_are_told_by_kind(line: str, kind: str) -> None:
    from bench import machine_code

    if line.startswith("/*"):
        [found] = [machine_code._parse_sass_line(*match) for match in machine_code._SASS.findall(line)]
    else:
        facts = ".vgpr_count: 1\n.vgpr_spill_count: 0\n.sgpr_spill_count: 0"
        [found] = machine_code.read_amd(f"{line}.Lfunc_end\n{facts}", 0).instructions
    assert found.load == kind and bool(found.bits) == (kind in ("LDG", "buffer_load"))


def test_a_shipped_projection_of_copies_is_a_violation() -> None:
    from bench.codegen import violations

    [found] = violations(dataclasses.replace(sound(), loads={"LDGSTS": 8}, weight_bits=0, in_flight=0.0, issue=0.0))
    assert "loads by LDGSTS" in found


def test_instructions_that_change_with_the_rows_are_named() -> None:
    from bench.codegen import mnemonics_differ

    other = dataclasses.replace(sound(), rows=64, matrix={"HGMMA.64x16x16.F32.BF16": 4})
    assert mnemonics_differ([sound(), dataclasses.replace(sound(), rows=8)]) == []
    [found] = mnemonics_differ([sound(), other])
    assert "HGMMA" in found and "rms_norm_glu on sm_90" in found


def launch_of(name: str, programs: int, registers: int, shared: int = 0, warps: int = 8, residents: int = 2):
    from bench.occupancy import Launch

    return Launch(name, programs, residents, warps, registers, shared, 16384, triggers=True, waits=True)


def room(first, second):
    """Pairs of a step in which only `first` and `second` matter."""
    from bench.machine_code import MACHINES
    from bench.occupancy import pairs

    others = [launch_of(name, 132, 8192) for name in ("qkv", "down")]
    found = {pair.name: pair for pair in pairs([first, second, *others], MACHINES["sm_90"])}
    return found[f"{first.name} -> {second.name}"]


@pytest.mark.parametrize(
    ("programs", "registers", "shared", "fits"),
    [
        (132, 32768, 0, 132),  # one a unit: half of the registers are left, for one program of 32768
        (192, 32768, 0, 72),  # 60 units hold two, and are full
        (256, 32768, 0, 8),
        (256, 16384, 0, 132),
        (256, 16384, 65536, 132),
        (256, 16384, 90000, 8),  # two hold all of the shared memory
        (1024, 32768, 0, 132),  # in waves: one has ended
        (1024, 32769, 0, 0),
    ],
)
def test_room_for_the_next_launch_by_hand(programs: int, registers: int, shared: int, fits: int) -> None:
    first = launch_of("cross_q", programs, registers, shared)
    pair = room(first, launch_of("cross_attention", 256, 32768, 60000))
    assert (pair.room, pair.needed) == (fits, 132)
    assert pair.in_flight == fits * 16384 / 132


def test_no_more_programs_have_room_or_are_needed_than_there_are() -> None:
    pair = room(launch_of("cross_q", 10, 8192), launch_of("cross_attention", 16, 8192))
    assert (pair.room, pair.needed) == (16, 16)


def test_a_crowded_pair_is_named_unless_it_is_recorded_and_a_record_that_is_wrong_too() -> None:
    from bench.occupancy import Neighbours, Pair, violations

    pairs = (Pair("qkv", "self_attention", 72, 112, 0.0), Pair("o", "cross_q", 140, 132, 0.0))
    step = Neighbours("sm_90", "bfloat16", 2, pairs)
    [found] = violations(step, {})
    assert found.startswith("qkv -> self_attention on sm_90, bfloat16, 2 rows: room for 72") and "112 needed" in found
    recorded = {"sm_90": {"bfloat16": {"2": ["qkv -> self_attention"]}}}
    assert violations(step, recorded) == []
    recorded["sm_90"]["bfloat16"]["2"].append("o -> cross_q")
    [found] = violations(step, recorded)
    assert "o -> cross_q" in found and "remove it" in found
    assert violations(dataclasses.replace(step, rows=64), {}) == []


def test_the_report_refuses_an_unknown_target(tmp_path: Path) -> None:
    run, _ = compile_for("sm_7", tmp_path)
    assert run.returncode == 2
    assert "invalid choice: 'sm_7'" in run.stderr


def test_a_brief_report_counts_what_each_target_and_dtype_compiled_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import codegen

    def report(targets: list[str], rows: object, dtypes: list[str], *more: object) -> list[codegen.Line]:
        if (targets, dtypes) == (["sm_90"], ["float16"]):
            raise KeyboardInterrupt  # what was compiled before is on disk
        [target], [dtype] = targets, dtypes
        line = codegen.Line(target, dtype, 2, "sample", 9, 4, 99, 0, 512, 0.5, 0, {}, 700, 0.0, 0.0)
        return [line, dataclasses.replace(line, registers=120, spills=8)]

    monkeypatch.setattr(codegen, "report", report)
    file = tmp_path / "matrix.json"
    with pytest.raises(KeyboardInterrupt):
        codegen.main(["--brief", "--targets", "sm_80", "sm_90", "--dtypes", "float32", "float16", "--json", str(file)])
    found = results.flat(results.read(file))
    assert [(one["target"], one["dtype"]) for one in found] == [
        ("sm_80", "float32"), ("sm_80", "float16"), ("sm_90", "float32"),
    ]  # fmt: skip
    values = {"kernels": 2, "spilling": 1, "registers": 120, "shared": 512, "violations": 1}
    assert all(values.items() <= one.items() for one in found) and "|" not in capsys.readouterr().out
