"""The custom operators: registered as torch wants them, equal to the reference, and usable under torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_kernels import launcher, reference
from dia_kernels import torch_library as library
from tests.kernels.support import random

EPS = 1e-5


def _integers(values: list, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def cases(device: torch.device) -> dict[str, tuple]:
    """Arguments for every operator: small, fp32, so that the kernels' results are close to the reference's."""

    def r(*shape: int, seed: int = 0) -> Tensor:
        return random(shape, torch.float32, device, seed)

    def bytes_(*shape: int) -> Tensor:
        return (r(*shape, seed=2) * 40).clamp(-127, 127).to(torch.int8)

    def scales(features: int) -> Tensor:
        return r(features, seed=5).abs() / 100 + 0.01

    heads, kv_heads, dim = 2, 1, 16
    cos, sin = r(20, dim // 2, seed=1).cos(), r(20, dim // 2, seed=1).sin()
    pages = r(3, kv_heads, 16, dim, seed=2), r(3, kv_heads, 16, dim, seed=3)
    table = _integers([[2], [0]], device)
    ones = torch.ones(2, device=device)
    return {
        "rms_norm": (r(3, 32), r(32, seed=1), EPS),
        "glu": (r(3, 32),),
        "rms_norm_linear": (r(2, 32), r(32, seed=1), r(16, 32, seed=2), EPS),
        "rms_norm_glu": (r(2, 32), r(32, seed=1), r(32, 32, seed=2), EPS),
        "linear_residual": (r(1, 32), r(16, 32, seed=2), r(2, 16, seed=3), r(16, seed=4)),
        "codebook_logits": (r(2, 32), r(32, seed=1), r(24, 32, seed=2), EPS, 3),
        "rms_norm_linear by int8": (r(2, 32), r(32, seed=1), bytes_(16, 32), EPS, scales(16)),
        "rms_norm_glu by int8": (r(2, 32), r(32, seed=1), bytes_(32, 32), EPS, scales(32)),
        "linear_residual by int8": (r(1, 32), bytes_(16, 32), r(2, 16, seed=3), r(16, seed=4), scales(16)),
        "codebook_logits by int8": (r(2, 32), r(32, seed=1), bytes_(24, 32), EPS, 3, scales(24)),
        "rope_attention": (r(2, (heads + 2 * kv_heads) * dim), cos, sin, *pages, table, _integers([3, -1], device)),
        "cross_attention": (r(2, heads * dim), *pages, table, _integers([5, 16], device)),
        "rope_attention by scale": (
            r(2, (heads + 2 * kv_heads) * dim), cos, sin, *pages, table, _integers([3, -1], device), 0.3,
        ),
        "cross_attention by scale": (r(2, heads * dim), *pages, table, _integers([5, 16], device), 0.3),
        "ragged_attention by scale": (
            r(5, heads, dim), r(5, kv_heads, dim), r(5, kv_heads, dim, seed=1), _integers([0, 2, 5], device), True, 0.3,
        ),
        "rope": (r(4, (heads + 2 * kv_heads) * dim), cos, sin, _integers([0, 1, 2, 0], device), kv_heads),
        "ragged_attention": (
            r(5, heads, dim), r(5, kv_heads, dim), r(5, kv_heads, dim, seed=1), _integers([0, 2, 5], device), True,
        ),
        "snake": (r(1, 2, 20), ones),
        "snake_residual": (r(1, 2, 20), r(1, 2, 20, seed=1), ones),
        "sample": (
            r(2, 2, 12), _integers([3], device), _integers([7], device, torch.int64),
            ones[:1] * 3, ones[:1], _integers([4], device), ones[:1] * 0.9, 8,
        ),
        "embed_codes": (
            _integers([[1, 2]], device), _integers([[[3, -1]]], device),
            *(_integers([v], device) for v in (0, 0, 9, -1)),
            _integers([0, 1], device), r(24, 16), torch.zeros(1, 10, 2, dtype=torch.int32, device=device),
            _integers([0, 0], device), _integers([0], device), torch.zeros(2, 16, device=device), 8, 9,
        ),
    }  # fmt: skip


NAMES = tuple(cases(torch.device("cpu")))


def operator(name: str) -> str:
    """Of a case, which may say what its weights are."""
    return name.partition(" ")[0]


def test_every_op_of_the_op_set_is_an_operator() -> None:
    tools = {"philox", "sample_weights", "attention_workspace", "pack", "PackedWeight"}
    assert set(map(operator, NAMES)) == set(reference.__all__) - tools
    assert all(hasattr(torch.ops.dia_kernels, operator(name)) for name in NAMES)


def test_a_table_may_name_every_op_that_asks_for_a_config(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, configuration = set(), launcher.configuration

    def noted(op: str, *args: Any, **named: Any) -> Any:
        asked.add(op)
        return configuration(op, *args, **named)

    monkeypatch.setattr(launcher, "configuration", noted)
    for name, arguments in cases(device).items():
        getattr(library, operator(name))(*arguments)
    assert asked == launcher.OPS


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, device: torch.device) -> None:
    torch.library.opcheck(getattr(torch.ops.dia_kernels, operator(name)).default, cases(device)[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_agree_with_the_reference(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and every argument written in place. The kernels' own tests measure errors; this finds a wrong wiring.

    That changes results by their own size. A ten-thousandth of it is left to sums and exponentials, which differ
    between targets.
    """
    assert library.implementation(device) == "triton"
    mine = cases(device)[name]
    results = getattr(library, operator(name))(*mine)
    monkeypatch.setattr(library, "implementation", lambda device: "torch")
    theirs = cases(device)[name]
    expected = getattr(library, operator(name))(*theirs)
    for got, want in zip(_tensors((results, *mine)), _tensors((expected, *theirs)), strict=True):
        size = want.abs().max().item() if want.is_floating_point() and want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * size)


def _tensors(values: tuple) -> list[Tensor]:
    flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("op", ["rope_attention", "cross_attention", "ragged_attention"])
def test_a_scale_is_that_of_q(
    op: str, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit for a power of two: no rounding depends on it."""
    monkeypatch.setattr(library, "implementation", lambda device: implementation)
    run, (q, *rest) = getattr(library, op), cases(device)[op]
    plain = run(q, *(value.clone() if isinstance(value, Tensor) else value for value in rest))
    scaled = run(q, *rest, scale=0.25)
    quarter = q.clone()
    quarter[:, : 2 * 16 if op == "rope_attention" else None] *= 0.25  # of q, k and v in a row q alone
    assert torch.equal(scaled, run(quarter, *rest)) and not torch.equal(scaled, plain)
    with pytest.raises(ValueError, match="scale: nan, needs a finite number"):
        run(q, *rest, scale=float("nan"))


def test_one_workspace_for_calls_of_any_size(device: torch.device) -> None:
    """Several splits a row, so that results go through it; its counters are 0 after each call."""
    dim, kv_heads = 16, 1
    pages = tuple(random((32, kv_heads, 64, dim), torch.float32, device, seed) for seed in (2, 3))
    workspace = library.attention_workspace(4, 2, dim, 8 * 64, device)

    def both(rows: int, heads: int, per_row: int, seed: int, workspace: Tensor | None) -> list[Tensor]:
        q = random((rows, heads * dim), torch.float32, device, seed)
        qkv = random((rows, (heads + 2 * kv_heads) * dim), torch.float32, device, seed)
        cos, sin = (random((600, dim // 2), torch.float32, device, 7 + i) for i in range(2))
        table = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[: rows * per_row]
        table = table.view(rows, per_row).int().to(device)
        last = _integers([per_row * 64 - 1 - row for row in range(rows)], device)
        cached = [part.clone() for part in pages]
        return [
            library.cross_attention(q, *pages, table, last, workspace=workspace),
            library.rope_attention(qkv, cos, sin, *cached, table, last, workspace=workspace),
        ]

    for sizes in ((4, 2, 8, 0), (1, 2, 8, 1), (3, 1, 6, 2), (4, 2, 3, 3)):
        for got, want in zip(both(*sizes, workspace), both(*sizes, None), strict=True):
            assert torch.equal(got, want)
        assert not workspace.view(-1)[: len(workspace)].any()
    assert workspace.any(), "nothing went through it"
    with pytest.raises(ValueError, match="workspace: too small for this call"):
        both(4, 4, 6, 4, workspace)
    with pytest.raises(ValueError, match="needs what attention_workspace returns"):
        both(4, 2, 6, 4, workspace.double())
    torch.library.opcheck(
        torch.ops.dia_kernels.cross_attention.default,
        (*cases(device)["cross_attention"], 1.0, library.attention_workspace(2, 2, dim, 16, device)),
    )


def test_operators_inside_torch_compile(device: torch.device) -> None:
    def block(x: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> Tensor:
        residual = x * 2
        library.linear_residual(library.rms_norm_glu(x, norm, up, EPS), down, residual)
        return residual + 1

    compiled: Callable = torch.compile(block, fullgraph=True, backend="aot_eager")
    arguments = tuple(
        random(shape, torch.float32, device, seed) for seed, shape in enumerate([(2, 32), (32,), (64, 32), (32, 32)])
    )
    assert torch.equal(compiled(*arguments), block(*arguments))
