"""The check of row bits: PTX run on numpy against plain arithmetic; what the check says of sound and of broken code."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: there is nothing to compile with", allow_module_level=True)

from bench import ptx

ROOT = Path(__file__).parents[2]
BASE = ptx.BUFFER


def run(body: str, *memory: np.ndarray) -> dict[int, int]:
    """Run 32 threads; return words by byte offset in the last buffer. Buffers are in %rd1, %rd2, ..."""
    threads = 32
    contents = [array.ravel().view(np.uint16) for array in memory]
    buffers = {n + 1: lambda at, array=array: array[at // 2] for n, array in enumerate(contents)}
    parameters = [(n + 1) * BASE for n in range(len(memory) + 1)]
    loads = "\n".join(f"ld.param.b64 %rd{n + 1}, [k_param_{n}];" for n in range(len(parameters)))
    text = f".visible .entry k()\n{{\n.reg .b32 %r<9>;\n{loads}\nmov.u32 %r1, %tid.x;\n{body}\nret;\n}}\n"
    program = ptx.Program(0, threads, parameters, buffers).run(text)
    return {at - parameters[-1]: word for at, word in program.written.items()}


def words(written: dict[int, int], dtype: type) -> np.ndarray:
    """All that was written, in order, as numbers."""
    assert sorted(written) == list(range(0, 2 * len(written), 2))
    return np.array([written[at] for at in sorted(written)], np.uint16).view(dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_arithmetic_of_threads() -> None:
    x, y = numbers(32), numbers(32) + 3
    body = """
    mul.wide.u32 %rd9, %r1, 4;
    add.s64 %rd4, %rd1, %rd9;
    ld.global.L1::evict_last.b32 { %r2 }, [ %rd4 + 0 ];
    add.s64 %rd5, %rd2, %rd9;
    ld.global.b32 %r3, [%rd5];
    fma.rn.f32 %r4, %r2, %r3, 0f3F800000;
    shfl.sync.bfly.b32 %r5, %r4, 3, 31, -1;
    add.f32 %r6, %r4, %r5;
    rsqrt.approx.ftz.f32 %r7, %r3;
    setp.lt.s32 %p1, %r1, 16;
    @%p1 mul.f32 %r6, %r6, %r7;
    add.s64 %rd6, %rd3, %rd9;
    st.global.b32 [ %rd6 + 0 ], { %r6 };
    """
    value = (x.double() * y.double() + 1).float()
    value = value + value[torch.arange(32) ^ 3]
    value[:16] = (value[:16].double() * (1 / y.double().sqrt()).float()[:16].double()).float()
    np.testing.assert_array_equal(words(run(body, x.numpy(), y.numpy()), np.float32), value.numpy())


def test_integers_wrap_and_keep_their_sign() -> None:
    body = """
    add.s32 %r2, %r1, -16;
    min.s32 %r3, %r2, 5;
    bfe.s32 %r4, %r1, 1, 2;
    mad.wide.s32 %rd4, %r2, 8, %rd1;
    mul.lo.s32 %r5, %r1, 200000000;
    shr.s32 %r6, %r2, 1;
    xor.b32 %r7, %r3, %r4;
    add.s32 %r7, %r7, %r5;
    add.s32 %r7, %r7, %r6;
    shl.b32 %r8, %r1, 2;
    cvt.u64.u32 %rd5, %r8;
    add.s64 %rd6, %rd1, %rd5;
    st.global.b32 [%rd6], %r7;
    """
    tid = np.arange(32, dtype=np.int64)
    field = (tid >> 1) & 3
    expected = (np.minimum(tid - 16, 5) ^ np.where(field > 1, field - 4, field)) + tid * 200000000 + ((tid - 16) >> 1)
    np.testing.assert_array_equal(words(run(body), np.int32), expected.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_matrix_product_by_fragments(kind: str, dtype: torch.dtype) -> None:
    """Lane `4 g + t` holds rows g and g + 8 of A, column g of B, and pairs of neighbours 2 t, 2 t + 1 (PTX ISA)."""
    a, b = numbers(16, 16, dtype=dtype), numbers(8, 16, dtype=dtype)
    loads = "\n".join(
        f"ld.global.b32 %r{10 + n}, [ %rd{4 if n < 4 else 5} + {place} ];"
        for n, place in enumerate((0, 256, 16, 272, 0, 16))
    )
    body = f"""
    bfe.u32 %r2, %r1, 2, 3;
    and.b32 %r3, %r1, 3;
    shl.b32 %r4, %r2, 5;
    shl.b32 %r5, %r3, 2;
    or.b32 %r6, %r4, %r5;
    mad.wide.u32 %rd4, %r6, 1, %rd1;
    mad.wide.u32 %rd5, %r6, 1, %rd2;
    {loads}
    mov.b32 %r20, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{ %r20, %r21, %r22, %r23 }}, {{ %r10, %r11, %r12, %r13 }},
      {{ %r14, %r15 }}, {{ %r20, %r20, %r20, %r20 }};
    shl.b32 %r7, %r5, 1;
    or.b32 %r7, %r4, %r7;
    mad.wide.u32 %rd6, %r7, 1, %rd3;
    st.global.v2.b32 [ %rd6 + 0 ], {{ %r20, %r21 }};
    st.global.v2.b32 [ %rd6 + 256 ], {{ %r22, %r23 }};
    """
    memory = [t.contiguous().view(torch.int16).numpy() for t in (a, b)]
    got = words(run(body, *memory), np.float32).reshape(16, 8)
    exact, terms = (a.double() @ b.double().T).numpy(), (a.double().abs() @ b.double().abs().T).numpy()
    assert (abs(got - exact) <= 17 * 2.0**-24 * terms).all(), "17 additions, each rounded once"


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_go_through_shared_memory(trans: str, space: str) -> None:
    body = f"""
    and.b32 %r2, %r1, 7;
    shl.b32 %r3, %r2, 4;
    shl.b32 %r4, %r1, 2;
    mad.wide.u32 %rd4, %r4, 1, %rd1;
    ld.global.b32 %r5, [%rd4];
    mov.b32 %r6, global_smem;
    add.s32 %r7, %r6, %r3;
    stmatrix.sync.aligned.m8n8.x1.{space}.b16 [%r7], {{ %r5 }};
    ldmatrix.sync.aligned.m8n8.x1{trans}.{space}.b16 {{ %r8 }}, [%r7];
    mad.wide.u32 %rd5, %r4, 1, %rd2;
    st.global.b32 [%rd5], %r8;
    """
    tile = np.arange(64, dtype=np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(words(run(body, tile.ravel()), np.uint16).reshape(8, 8), tile.T if trans else tile)


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_words_go_through_shared_memory(space: str) -> None:
    """From thread to thread: each takes what its neighbour left."""
    body = f"""
    shl.b32 %r2, %r1, 2;
    mad.wide.u32 %rd4, %r2, 1, %rd1;
    ld.global.b32 %r3, [%rd4];
    st.{space}.b32 [ %r2 + 0 ], %r3;
    bar.sync 0;
    xor.b32 %r4, %r2, 4;
    ld.{space}.b32 %r5, [ %r4 + 0 ];
    mad.wide.u32 %rd5, %r2, 1, %rd2;
    st.global.b32 [%rd5], %r5;
    """
    given = np.arange(100, 132, dtype=np.uint32)
    found = words(run(body, given.view(np.uint16)), np.uint32)
    np.testing.assert_array_equal(found.reshape(16, 2)[:, ::-1].ravel(), given)


@given(st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1, max_size=20))
def test_bf16_is_rounded_once(values: list[float]) -> None:
    got = ptx.round_bf16(np.array(values))
    for value, bits in zip(values, got, strict=True):
        near = float(torch.tensor([int(bits)]).to(torch.int16).view(torch.bfloat16))
        for other in (-1, 1):
            neighbour = float(torch.tensor([int(bits) + other]).to(torch.int16).view(torch.bfloat16))
            assert not abs(neighbour - value) < abs(near - value)


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"wgmma.mma_async.m64"):
        run("wgmma.mma_async.m64.f32 %r1, %r1;")
    for space in ("shared::cluster", "local", "b32"):
        with pytest.raises(NotImplementedError, match=f"state space {space}"):
            run(f"st.{space}.b32 [%rd1], %r1;")
    with pytest.raises(NotImplementedError, match=r"shfl.sync.down"):
        run("shfl.sync.down.b32 %r2, %r1, 1, 31, -1;")


def check(tmp_path: Path, *options: str, table: dict | None = None) -> subprocess.CompletedProcess[str]:
    """Run the check in a process of its own, since this one may interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    if table:
        (tmp_path / "table.json").write_text(json.dumps(table))
        environment["DIA_KERNELS_TABLE"] = str(tmp_path / "table.json")
    command = [sys.executable, "-m", "bench.row_bits", *options]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


FEW = ("--targets", "sm_90", "--dtypes", "bfloat16", "--rows", "2", "16")


def test_rows_agree_and_are_right(tmp_path: Path) -> None:
    found = check(tmp_path, *FEW)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(" values in common, 0 wrong") == 6
    assert "rms_norm_glu [16384, 2048]: 32 values in common" in found.stdout


def test_rows_agree_and_are_right_by_weights_in_8_bits(tmp_path: Path) -> None:
    found = check(tmp_path, *FEW, "--weights", "int8")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(" values in common, 0 wrong") == 6


def test_bytes_are_permuted() -> None:
    body = """
    mul.wide.u32 %rd9, %r1, 4;
    add.s64 %rd4, %rd1, %rd9;
    ld.global.b32 %r2, [%rd4];
    prmt.b32 %r3, %r2, 0x64656667, 0x4170;
    add.s64 %rd6, %rd2, %rd9;
    st.global.b32 [ %rd6 + 0 ], { %r3 };
    """
    x = numbers(32).numpy().view(np.uint32)
    expected = 0x67 << 24 | (x >> 8 & 255) << 16 | 0x64 << 8 | (x & 255)
    np.testing.assert_array_equal(words(run(body, x), np.uint32), expected)
    with pytest.raises(NotImplementedError, match="prmt with selector"):
        run("prmt.b32 %r2, %r1, 0, 0x9140;")


def test_another_order_of_a_sum_is_found(tmp_path: Path) -> None:
    table = {"linear_residual": [{"where": {"rows": 16, "hidden": 2048}, "use": {"CHUNKS": 1}}]}
    found = check(tmp_path, *FEW, table=table)
    assert found.returncode == 1
    assert "linear_residual [2048, 2048] on sm_90, bfloat16, 16 rows" in found.stderr
    assert "differ from linear_residual [2048, 2048] on sm_90, bfloat16, 2 rows" in found.stderr
    assert "\n1 violations" in found.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_count(dtype: str, weights: str, tmp_path: Path) -> None:
    found = check(tmp_path, "--dtypes", dtype, "--weights", weights)
    assert found.returncode == 0, found.stderr


def test_errors_and_differences_are_named() -> None:
    from bench.row_bits import Result, compare

    sound = Result({(0, 0): (5, 1), (0, 1): (6, 1)}, 0.5)
    assert compare([("one", sound), ("two", Result({(0, 1): (6, 1), (1, 0): (7, 1)}, 1.0))]) == []
    [found] = compare([("one", sound), ("two", Result({(0, 0): (5, 1), (0, 1): (6, 2)}, 1.0))])
    assert found == "two: 1 of 2 values differ from one, first row 0, feature 1"
    assert compare([("one", Result({}, float("nan")))]) == ["one: error nan x what is allowed"]
