"""The formulas of `dia_fast.diagnostics.roofline.work` give what `bench.traffic` counts, to the byte."""

import pytest
import torch

from bench import traffic
from dia_fast.diagnostics.roofline import work
from dia_fast.model.config import DiaConfig
from dia_fast.model.quantization import quantized_names
from dia_kernels.triton import gemv
from dia_kernels.triton import paged_attention as paged
from tests.kernels import executor
from tests.kernels.test_traffic import wide

pytestmark = pytest.mark.skipif(not executor.interpreted(), reason="accesses are counted in the interpreter only")

CONTEXTS = [3, 200]  # codes prescribed and one split; free, and two splits


def formulas(config: DiaConfig, rows: int, context: int, dtype: torch.dtype, weights: str) -> dict[str, work.Work]:
    """The same step as `bench.traffic.measure` makes, whose guidance scale is 1."""
    decoder, guided, batch = config.decoder, rows > 1, max(rows // 2, 1)
    step = work.Step(
        batch, context, traffic.TEXT, dtype.itemsize, guided, batch, max(CONTEXTS) + 1, traffic.TEXT, mixes=False,
        prompt_codes=context <= max(config.delay_pattern) + 1, weights=weights,
    )  # fmt: skip

    def block(name: str, count: int) -> int:
        op = work.KERNELS[name]
        bits = 8 if name in work.IN_8_BITS[weights] else None
        config = gemv.default_config(op, dtype, "interpreter", rows=count, features=0, hidden=0, weight_bits=bits)
        return config["BLOCK_N"]

    splits = (
        work.split(decoder.head_dim, dtype.itemsize, "interpreter", work.SELF_SPLIT),
        work.split(decoder.cross_head_dim, dtype.itemsize, "interpreter", work.CROSS_SPLIT),
    )
    tiles = work.Tiles(block, *splits, reads_twice=dtype == torch.float16)
    return {item.name: item for item in work.launches(config, step, tiles)}


@pytest.mark.parametrize(
    ("rows", "dtype", "weights"),
    [
        (1, torch.float32, "float"), (2, torch.bfloat16, "float"), (4, torch.float16, "float"),
        (2, torch.bfloat16, "int8"), (4, torch.float16, "int8-mlp"),
    ],
    ids=str,
)  # fmt: skip
def test_formulas_equal_what_is_counted(rows: int, dtype: torch.dtype, weights: str) -> None:
    with torch.inference_mode():
        found = traffic.measure(wide(), rows, CONTEXTS, dtype, weights)
    names = [*work.LAUNCHES, "self_attention"]
    assert len(found) == len(names)
    for name, counted in zip(names, found, strict=True):
        item = formulas(wide(), rows, counted.context, dtype, weights)[name]
        assert item.kernel == counted.kernel
        expected = [counted.weights, counted.kv, counted.other, counted.again]
        got = [item.weights, item.kv, item.other, item.again]
        if name == "embed" and rows > 2:
            # The meter's slots all choose the same codes: it finds the second slot's table rows in the cache.
            expected[2:], got[2:] = [sum(expected[2:])], [sum(got[2:])]
        assert got == expected, f"{name} at context {counted.context}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942", "gfx1100"])
def test_tokens_per_program_follow_the_default_config_of_the_kernels(target: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (16, 48, 64, 96, 128, 256):
            for wanted in (work.SELF_SPLIT, work.CROSS_SPLIT):
                chosen = paged._default_config(dtype, target, split=wanted, group=4, head_dim=dim)["SPLIT"]
                assert work.split(dim, dtype.itemsize, target, wanted) == chosen


@pytest.mark.parametrize("weights", work.IN_8_BITS)
def test_launches_in_8_bits_are_the_matrices_that_are_rounded(weights: str) -> None:
    names = quantized_names(wide(), weights)
    launched = {name.rpartition(".")[2] for name in names if name.startswith("decoder.")} - {"cross_kv"}
    assert launched == {"head" if name == "heads" else name for name in work.IN_8_BITS[weights]}
