"""Ops of one's own in the place of shipped ones: in a model, in the tools, in these tests."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import dia_fast
from bench import codegen, occupancy
from bench.machine_code import MACHINES
from dia_fast.diagnostics.roofline import work
from dia_fast.errors import InputError
from dia_kernels import launcher, reference, with_ops
from dia_kernels import triton as kernels
from examples import own_glu
from tests.kernels.support import DTYPES, assert_within_budget, poisoned, random

ROOT = Path(__file__).resolve().parents[2]


def exact_glu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 333), (3, 2500)])
def test_the_template(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x = random((rows, 2 * width), dtype, device, 1, 3.0)
    out = own_glu.glu(x, poisoned((rows, width), dtype, device))
    plain = reference.glu(x, poisoned((rows, width), dtype, device))
    assert_within_budget(out, plain, exact_glu(x))
    assert torch.equal(own_glu.glu(x[:1], poisoned((1, width), dtype, device)), out[:1])
    with pytest.raises(ValueError, match="x: shape"):
        own_glu.glu(x, poisoned((rows, width + 1), dtype, device))


def test_an_op_set_with_one_replaced() -> None:
    for own in (own_glu, "examples.own_glu", {"glu": own_glu.glu}, "tests.kernels.test_own_ops:GIVEN"):
        ops = with_ops(kernels, own)
        assert ops.glu is own_glu.glu and ops.name == "triton"
        assert all(getattr(ops, name) is getattr(kernels, name) for name in kernels.__all__ if name != "glu")
    assert kernels.glu is not own_glu.glu


GIVEN = {"glu": own_glu.glu}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rms_nrom": len}, "'rms_nrom' is no op of dia_kernels.reference; did you mean 'rms_norm'"),
        ({"philox": len}, "'philox' is no op"),
        ({"glu": 3}, "glu must be a function, not 3"),
        (ModuleType("empty"), "empty defines none of .*glu"),
        ("no_such_module", "cannot import 'no_such_module'"),
        ("examples.own_glu:glu_of_nobody", "cannot import"),
        ("", "cannot import ''"),
        (3, "must be a mapping"),
    ],
)
def test_ops_that_cannot_be(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_ops(reference, own)
    with pytest.raises(InputError, match=message):
        dia_fast.Dia.from_pretrained("demo", device="cpu", ops=own)


@pytest.mark.filterwarnings("ignore:speech was cut")
def test_a_model_runs_on_them() -> None:
    calls = []

    def glu(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return reference.glu(x, out)

    codes = []
    for own in (None, {"glu": glu}):
        with dia_fast.Dia.from_pretrained("demo", device="cpu", ops=own, codec=None) as dia:
            assert (dia.model.ops.glu is glu) is (own is not None) and dia.model.ops.name == "torch"
            codes += dia.generate_codes("[S1] one two", temperature=0.0, max_new_tokens=30)
    assert calls and torch.equal(*codes)


def test_tables_may_name_a_registered_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_registered", set())
    path = tmp_path / "table.json"
    path.write_text('{"mine": [{"use": {"BLOCK": 32}}]}')
    with pytest.raises(ValueError, match="knows no op mine"):
        launcher.read_table(str(path))
    launcher.register("mine")
    assert launcher.read_table(str(path))["mine"][0]["use"] == {"BLOCK": 32}
    with pytest.raises(ValueError, match="must be a name"):
        launcher.register("my glu")


def test_the_tools_take_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(codegen, "report", lambda *given: seen.append(given[-1]) or [])
    assert codegen.main(["--ops", "examples.own_glu"]) == 0 and seen[0].glu is own_glu.glu
    assert codegen.main([]) == 0 and seen[-1] is kernels
    assert codegen.main(["--ops", "nothing:at_all"]) == 2 and "cannot import" in capsys.readouterr().err


def test_a_kernel_of_ones_own_is_found_in_its_place_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "launch", lambda name, item, code, machine: (name, item.kernel))
    shipped = [f"_{work.KERNELS[name]}" for name in work.LAUNCHES]

    def found(names: list[str]) -> list[Any]:
        items: Any = [SimpleNamespace(kernel=name) for name in names]
        return list(occupancy.step_launches(items, [None] * len(names), MACHINES["sm_90"]))  # type: ignore[list-item]

    own = ["_mine" if name == "_rms_norm_linear" else name for name in shipped]
    assert found(own) == list(zip(work.LAUNCHES, own, strict=True)) and found(shipped)[0][1] == shipped[0]
    assert found([*own, "_mine"]) == [], "of two launches it cannot be told which is whose"
    assert list(occupancy.pairs([], MACHINES["sm_90"])) == []
    for wrong in (shipped[1:], shipped[::-1]):
        with pytest.raises(ValueError, match="a decode step launches"):
            found(wrong)


def half_a_glu(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(x.float().chunk(2, -1)[0])


PLANTED = {"glu": half_a_glu}


@pytest.mark.parametrize(("own", "status"), [("examples.own_glu", 0), ("tests.kernels.test_own_ops:PLANTED", 1)])
def test_these_tests_judge_them(own: str, status: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_elementwise.py",
               "-k", "test_glu", "--ops", own]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout[-2000:]
