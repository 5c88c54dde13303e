"""The compiler's figures that come with the package: what they say, and how they are made from reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import figures as maker
from bench.codegen import Line
from bench.machine_code import MACHINES
from bench.tools import results
from dia_fast.diagnostics.roofline import figures, work
from dia_fast.model.quantization import FLOAT

FIRST = [name + work.FIRST for name in ("cross_attention", "sample")]
TRITON = pytest.importorskip("triton", reason="the configs that figures are compared with are those of the kernels")


def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(figures.__file__).parent / figures.FILE).read_text(encoding="utf-8"))
    return found


def report_lines(
    target: str = "sm_90", dtype: str = "bfloat16", rows: int = 2, kind: str = "bfloat16"
) -> list[dict[str, Any]]:
    """A step as `bench.codegen` reports it: o and cross_o are alike, so the second is left out."""
    kernels = [
        ("embed_codes", 1, 469), ("rms_norm_linear", 192, 501), ("rope_attention", 200, 1413),
        ("linear_residual", 128, 351), ("rms_norm_linear", 128, 500), ("cross_attention", 256, 1002),
        ("rms_norm_glu", 1024, 513), ("linear_residual", 128, 887), ("codebook_logits", 579, 502), ("sample", 9, 3271),
    ]  # fmt: skip
    return [
        {
            "target": target, "dtype": dtype, "rows": rows, "kernel": kernel, "programs": programs, "warps": 8,
            "registers": 100, "spills": 0, "shared": 4096, "occupancy": 0.25, "weight_bits": 128, "matrix": {},
            "instructions": instructions, "in_flight": 65536.0 * min(2, programs / 132),
            "issue": 0.1 if instructions == 887 else 0.22, "weights": FLOAT, "all_in_flight": True,
            "loads": "", "projection": True,
            "kind": kind,
        }
        for kernel, programs, instructions in kernels
    ]  # fmt: skip


def write_report(path: Path, triton: str, lines: list[dict[str, Any]], bench: str = "codegen") -> None:
    """Write lines as `bench.codegen --json` does."""
    pairs = ({name: line[name] for name in ("target", "dtype", "rows", "kernel")} for line in lines)
    head = results.header(bench, [], torch.device("cpu"))
    head["versions"]["triton"] = triton
    rows = [
        {"case": case, "values": {k: v for k, v in line.items() if k not in case and k not in ("matrix", "kind")}}
        for case, line in zip(pairs, lines, strict=True)
    ]
    path.write_text(results.dump(head | {"status": 0, "results": rows}))


def test_every_target_is_there_and_the_file_is_small() -> None:
    assert set(table()["figures"]) == set(MACHINES)
    assert (Path(figures.__file__).parent / figures.FILE).stat().st_size < 100_000
    for dtypes in table()["figures"].values():
        assert {"bfloat16", "bfloat16 x int8"} <= set(dtypes)
        for kind, names in dtypes.items():
            narrow = kind.endswith(figures.IN_8_BITS)
            assert set(names) == (set(work.PROJECTIONS) if narrow else {*work.LAUNCHES, *FIRST})


def test_rows_per_program_follow_the_default_config() -> None:
    """A change of the configs asks for a new report."""
    from bench.figures import shapes
    from dia_kernels.triton import gemv

    for target, dtypes in table()["figures"].items():
        for dtype, names in dtypes.items():
            for name in work.PROJECTIONS:
                for count, values in names[name].items():
                    op, (features, hidden) = work.KERNELS[name], shapes()[name]
                    narrow = dtype.endswith(figures.IN_8_BITS)
                    config = gemv.default_config(
                        op, getattr(torch, dtype.removesuffix(figures.IN_8_BITS)), target, rows=int(count),
                        features=features, hidden=hidden, weight_bits=8 if narrow else None,
                    )  # fmt: skip
                    assert values[0] == config["BLOCK_N"], (target, dtype, name, count)
                    blocks = -(-int(count) // config["BLOCK_R"])
                    assert int(count) == config["BLOCK_R"] * blocks == figures.bucket(target, int(count))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1100"])
def test_rows_that_share_code_share_figures(target: str) -> None:
    import torch

    from dia_kernels.triton import gemv

    found = figures.load(target, "bfloat16")
    for rows in range(1, 65):
        config = gemv.default_config("rms_norm_linear", torch.bfloat16, target, rows=rows, features=0, hidden=0)
        assert found.bucket(rows) == config["BLOCK_R"] * -(-rows // config["BLOCK_R"])
        assert found.find("qkv", rows).block == config["BLOCK_N"], rows


def test_what_was_not_compiled_has_a_stand_in_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures.load("sm_90", "bfloat16").stand_in == ""
    assert figures.load("gfx950", "bfloat16").target == "gfx942"
    assert "gfx950" in figures.load("gfx950", "bfloat16").stand_in
    assert [figures.load(name, "bfloat16").target for name in ("sm_103", "sm_75", "sm_121", "gfx1201", "gfx90a")] == [
        "sm_100", "sm_80", "sm_120", "gfx1100", "gfx942",
    ]  # fmt: skip
    # RDNA 2 has 32-wide warps and no matrix instructions of CDNA: the next newer RDNA is nearer than an older CDNA.
    assert figures.load("gfx1030", "bfloat16").target == "gfx1100"
    less = table()
    del less["figures"]["sm_90"]["float16"]
    monkeypatch.setattr(figures, "_read", lambda: less)
    found = figures.load("sm_90", "float16")
    assert (found.target, found.dtype) == ("sm_89", "float16")
    assert found.stand_in == "no kernels were compiled for sm_90 in float16; figures of sm_89 stand in"


def test_a_report_of_weights_in_8_bits_becomes_figures_of_its_projections() -> None:
    kernels = {work.KERNELS[name] for name in work.PROJECTIONS}
    lines = [
        line | {"weights": "int8", "issue": 2 * line["issue"]} if line["kernel"] in kernels else line
        for line in report_lines(kind="bfloat16 x int8")
    ]
    made = maker.compact(lines)["sm_90"]
    assert set(made) == {"bfloat16 x int8"} and set(made["bfloat16 x int8"]) == set(work.PROJECTIONS)
    per_load = 0.44 * MACHINES["sm_90"].slots_per_load
    assert made["bfloat16 x int8"]["qkv"] == {"8": [16, 8, 2, 65536, round(per_load, 1)]}
    shared = maker.compact([line | {"rows": 64, "programs": 2 * line["programs"]} for line in lines])["sm_90"]
    assert shared["bfloat16 x int8"]["qkv"]["64"][-1] == round(2 * per_load, 1), "twice the programs"


def test_figures_in_8_bits_stand_in_for_none_in_16(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, mixed = (figures.load("sm_90", "bfloat16", weights) for weights in ("float", "int8-mlp"))
    assert mixed.find("qkv", 2) == whole.find("qkv", 2) and mixed.find("gate_up", 2) != whole.find("gate_up", 2)
    assert mixed.find("gate_up", 2) == figures.load("sm_90", "bfloat16", "int8").find("gate_up", 2)
    beside = figures.load("gfx942", "float32", "int8").stand_in
    assert (
        beside == "no kernels were compiled for gfx942 in float32 x int8; figures of gfx942 in bfloat16 x int8 stand in"
    )
    less = table()
    del less["figures"]["sm_90"]["bfloat16 x int8"]
    monkeypatch.setattr(figures, "_read", lambda: less)
    assert "sm_90 in bfloat16 x int8; figures of sm_89 stand in" in figures.load("sm_90", "bfloat16", "int8").stand_in
    assert figures.load("sm_90", "bfloat16").stand_in == ""


def test_a_report_becomes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, out = tmp_path / "report.json", tmp_path / "codegen.json"
    outside = report_lines()[0] | {"rows": 0, "kernel": "glu"}
    write_report(report, "3.7.1", [*report_lines(), outside])
    assert maker.main([str(report), "--out", str(out)]) == 0
    made = json.loads(out.read_text())
    names = made["figures"]["sm_90"]["bfloat16"]
    assert made["triton"] == "3.7.1" and set(names) == set(work.LAUNCHES)
    per_load = 0.22 * MACHINES["sm_90"].slots_per_load
    assert names["qkv"] == {"8": [16, 8, 2, 65536, round(per_load, 1)]}
    assert names["cross_o"]["8"] == names["o"]["8"] != names["down"]["8"]
    assert names["self_attention"] == {"0": [work.SELF_SPLIT, 8, 2, 0, 1413]}
    assert "not among them: sm_80 bfloat16" in capsys.readouterr().out


def test_of_two_reports_of_one_step_the_later_one_counts_whole(tmp_path: Path) -> None:
    """Each leaves out launches that are like earlier ones, and they need not leave out the same."""
    other = report_lines()
    other.insert(6, other[3] | {"instructions": 400, "issue": 0.3})  # here cross_o is not like o
    for order in ((report_lines(), other), (other, report_lines())):
        paths = [tmp_path / f"{at}.json" for at in range(3)]
        for path, lines in zip(paths, (*order, report_lines(rows=64)), strict=True):
            write_report(path, "3.7.1", lines)
        _, together = maker.read(paths)
        assert maker.compact(together) == maker.compact([*order[1], *report_lines(rows=64)])


def test_the_first_generation_has_figures_of_its_own(tmp_path: Path) -> None:
    """It turns queries in cross-attention, and draws from the guided logits; all else is the same code."""
    first = [report_lines()[at] | {"kernel": name, "instructions": 77} for at, name in ((5, FIRST[0]), (9, FIRST[1]))]
    made = maker.compact([*report_lines(), *first])["sm_90"]["bfloat16"]
    assert made["sample"]["0"][-1] == 3271 and made[FIRST[1]]["0"][-1] == 77
    assert made[FIRST[0]]["0"][0] == made["cross_attention"]["0"][0] > 0, "tokens of a program"
    for target in MACHINES:
        second, other = (figures.load(target, "bfloat16", first_generation=first) for first in (False, True))
        assert set(second.lines) == set(other.lines) == set(work.LAUNCHES)
        differing = {name for name in work.LAUNCHES if second.lines[name] != other.lines[name]}
        assert differing == {"cross_attention", "sample"}, target


def test_a_report_of_one_row_count_updates_the_rest_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, out = tmp_path / "report.json", tmp_path / "codegen.json"
    out.write_text((Path(figures.__file__).parent / figures.FILE).read_text())
    before = json.loads(out.read_text())
    write_report(report, before["triton"], report_lines())
    assert maker.main([str(report), "--out", str(out), "--update"]) == 0
    after = json.loads(out.read_text())
    changed, kept = after["figures"]["sm_90"]["bfloat16"], before["figures"]["sm_90"]["bfloat16"]
    assert changed["sample"]["0"][-1] == 3271
    assert changed["qkv"] == kept["qkv"] | {"8": changed["qkv"]["8"]} != kept["qkv"]
    for table in (before, after):
        del table["figures"]["sm_90"]["bfloat16"]
    assert before == after
    write_report(report, "3.6.0", report_lines())
    assert maker.main([str(report), "--out", str(out), "--update"]) == 2
    assert "is of Triton" in capsys.readouterr().err


def test_code_that_does_not_tell_weights_apart_is_counted_whole() -> None:
    lines = [line | {"issue": 0.0, "in_flight": 0.0} for line in report_lines("gfx1100")]
    made = maker.compact(lines)["gfx1100"]["bfloat16"]
    loads = 16 * 2048 * 2 / (16 * 32)
    assert made["qkv"]["16"][3:] == [0, round(501 * 8 / loads, 1)]


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([{"triton": "3.7.1", "lines": report_lines()}, {"triton": "3.6.0", "lines": []}], "different versions"),
        ([{"triton": "3.7.1", "lines": [], "bench": "traffic"}], "no report of bench.codegen, but of traffic"),
        ([{"triton": "3.7.1", "lines": report_lines()[1:]}], "has the launches"),
        ([{"triton": "3.7.1", "lines": [line | {"programs": 77} for line in report_lines()]}], "77 programs"),
        ([{"triton": "3.7.1", "lines": report_lines() * 2}], "embed_codes is launched 2 times in a step"),
    ],
)
def test_reports_that_do_not_fit_are_refused(
    reports: list[dict[str, Any]], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for at, content in enumerate(reports):
        paths.append(tmp_path / f"{at}.json")
        write_report(paths[-1], **content)
    assert maker.main([*map(str, paths), "--out", str(tmp_path / "out.json")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_report_lines_have_the_fields_of_the_codegen_report() -> None:
    assert set(report_lines()[0]) == {*Line.__dataclass_fields__, "kind"}
