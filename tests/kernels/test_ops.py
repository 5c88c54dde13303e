"""The choice of the op set, and the place where launches are configured and listened to."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_kernels import aot, get_ops, reference
from dia_kernels import launcher as launch


def run(code: str, **environment: str) -> list[str]:
    """Lines that a fresh Python prints: whether Triton is interpreted is settled when it is imported."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_auto_on_a_cpu_is_torch() -> None:
    for backend in ("auto", "torch"):
        assert get_ops(backend, "cpu") is get_ops(backend, torch.device("cpu")) is reference
    assert get_ops() is reference and reference.name == "torch"


@pytest.mark.parametrize("backend", ["cuda", "Torch", ""])
def test_unknown_backends_are_named(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend: {backend!r} is unknown, use one of 'auto', 'torch', 'triton'"):
        get_ops(backend)


ATTEMPTS = """
import sys
import tempfile
from dia_kernels import get_ops
get_ops("torch").rms_norm
print("triton" in sys.modules)
for backend, device in (("triton", "cpu"), ("auto", "cpu"), ("auto", "cuda")):
    try:
        print(get_ops(backend, device).name)
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_needs_something_to_run_on() -> None:
    """And the torch ops import none of it."""
    pytest.importorskip("triton")
    assert run(ATTEMPTS, TRITON_INTERPRET="1") == ["False", "triton", "torch", "triton"]
    imported, triton, auto, gpu = run(ATTEMPTS)
    assert (imported, auto) == ("False", "torch")
    assert "backend: 'triton' cannot run" in triton and "set TRITON_INTERPRET=1 before starting Python" in triton
    assert "backend: 'auto' cannot run on device 'cuda'" in gpu and "backend='torch' works on any device" in gpu


def test_without_triton_torch_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert get_ops("auto", "cpu") is reference
    with pytest.raises(ValueError, match="backend: 'triton' cannot run on device 'cpu': triton is not installed"):
        get_ops("triton", "cpu")


def default(dtype: torch.dtype, arch: str, rows: int, hidden: int) -> dict[str, int]:
    return {"BLOCK_N": 16 if dtype == torch.float32 else 32, "num_warps": min(rows, 4)}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a user's table; a fake architecture, since configurations are looked at and not launched."""
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")

    def write(content: object) -> Path:
        path = tmp_path / f"table{len(list(tmp_path.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("DIA_KERNELS_TABLE", str(path))
        return path

    return write


def configured(dtype: torch.dtype = torch.bfloat16, rows: int = 2) -> dict[str, int]:
    return launch.configuration("glu", default, dtype, torch.device("cpu"), rows=rows, hidden=64)


def test_a_configuration_is_the_default_under_the_first_entry_that_fits(table: Any) -> None:
    assert configured() == {"BLOCK_N": 32, "num_warps": 2} and configured(torch.float32)["BLOCK_N"] == 16
    configured()["BLOCK_N"] = 0
    assert configured()["BLOCK_N"] == 32, "what a caller does to its configuration stays there"
    entries = [
        {"where": {"arch": "sm_80"}, "use": {"BLOCK_N": 1}},
        {"where": {"rows": 2, "dtype": "bfloat16"}, "use": {"BLOCK_N": 64}},
        {"use": {"num_warps": 8}},
    ]
    table({"glu": entries, "snake": [{"use": {"BLOCK_N": 2}}]})
    assert configured() == {"BLOCK_N": 64, "num_warps": 2}
    assert configured(rows=3) == {"BLOCK_N": 32, "num_warps": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected"),
        ({"glu": {"use": {}}}, "expected"),
        ({"glu": [{"use": 3}]}, "expected"),
        ({"gluu": []}, "knows no op gluu; there are codebook_logits, "),
        ({"glu": [{"where": {}}]}, "expected"),
        ({"glu": [{"use": {"BLOCK_Q": 1}}]}, "'use' may set BLOCK_N, num_warps, not BLOCK_Q"),
        ({"glu": [{"where": {"rows": {"max": 1.5}}, "use": {}}]}, 'glu: rows is {"max": 1.5}; needs a value, a list'),
        ({"glu": [{"where": {"rows": {"most": 1}}, "use": {}}]}, "needs a value, a list"),
        ({"glu": [{"where": {"rows": [True]}, "use": {}}]}, "needs a value, a list"),
        ({"glu": [{"where": {"arch": {"min": 90}}, "use": {}}]}, "needs a value, a list"),
        ({"glu": [{"where": {"arch": "sm90"}, "use": {}}]}, "arch 'sm90' is none that there is; did you mean 'sm_90'"),
        ({"glu": [{"where": {"arch": ["sm_90", "gfx_942"]}, "use": {}}]}, "'gfx_942' .* did you mean 'gfx942'"),
        ({"glu": [{"where": {"dtype": "bf16"}, "use": {}}]}, "dtype 'bf16' .* did you mean 'bfloat16'"),
        ({"glu": [{"where": {"row": 1}, "use": {}}]}, "'where' may name dtype, arch, rows, hidden, not row"),
    ],
)
def test_mistakes_in_a_table_are_named(content: object, message: str, table: Any) -> None:
    path = table(content)
    with pytest.raises(ValueError, match=message) as caught:
        configured()
    assert str(path) in str(caught.value)


def test_architectures_that_no_table_ships_for_may_be_named(table: Any) -> None:
    for arch in (*aot.TARGETS, "sm_75", "sm_103", "gfx90a", "gfx1250", "interpreter"):
        launch.read_table(str(table({"glu": [{"where": {"arch": arch}, "use": {"num_warps": 2}}]})))


SIZES = st.integers(1, 9)
RANGES = st.fixed_dictionaries({}, optional={"min": SIZES, "max": SIZES})


@given(rows=SIZES, wanted=st.one_of(SIZES, st.lists(SIZES), RANGES))
def test_a_size_is_a_value_a_list_or_a_range(rows: int, wanted: Any) -> None:
    if isinstance(wanted, dict):
        expected = rows in range(wanted.get("min", 1), wanted.get("max", 9) + 1)
    else:
        expected = rows in (wanted if isinstance(wanted, list) else [wanted])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        path.write_text(json.dumps({"glu": [{"where": {"rows": wanted}, "use": {"num_warps": 1}}]}))
        launch.read_table.cache_clear()
        found = launch.find_entry(path, "glu", {"rows": rows})
    assert (found == {"num_warps": 1}) == expected


def test_a_table_that_is_not_there_is_named(table: Any) -> None:
    path = table({})
    path.unlink()
    with pytest.raises(ValueError, match=f"DIA_KERNELS_TABLE: cannot read {path}: No such file"):
        configured()


def test_listeners_nest_and_end() -> None:
    seen: list[tuple[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **meta: seen.append(("launched", (grid, args, meta)))

    def listener(name: str) -> Any:
        def listen(run: Any, kernel: Any, grid: Any, args: Any, meta: Any) -> Any:
            seen.append((name, grid))
            return run(kernel, grid, *args, **meta)

        return listen

    with launch.listening(listener("outer")), launch.listening(listener("inner")):
        launch.run(Kernel(), (3,), 1, 2, BLOCK=4)
    launch.run(Kernel(), (5,))
    assert [name for name, _ in seen] == ["inner", "outer", "launched", "launched"]
    assert seen[2][1] == ((3,), (1, 2), {"BLOCK": 4})
