"""The traffic meter counts what is moved, and sees what should not be."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import traffic
from dia_fast.model.config import DiaConfig
from dia_kernels import launcher as launch
from tests.kernels import executor
from tests.kernels.test_whole_model import config

pytestmark = pytest.mark.skipif(not executor.interpreted(), reason="accesses are counted in the interpreter only")


def wide() -> DiaConfig:
    """Weights that outweigh the activations, as in any model worth the name."""
    small = config()
    return replace(small, decoder=replace(small.decoder, hidden_size=128, intermediate_size=256, num_hidden_layers=1))


@pytest.fixture(scope="module")
def found() -> list[traffic.Traffic]:
    with torch.inference_mode():
        return traffic.measure(wide(), 2, [5, 40], torch.bfloat16)


def test_every_weight_is_read_exactly_once(found: list[traffic.Traffic]) -> None:
    decoder = wide().decoder
    heads, kv_heads, dim = decoder.num_attention_heads, decoder.num_key_value_heads, decoder.head_dim
    assert all(item.weights_once for item in found)
    qkv, glu = next(item for item in found if item.weights), next(item for item in found if "glu" in item.kernel)
    assert qkv.weights == 2 * (heads + 2 * kv_heads) * dim * 128
    assert glu.weights == 2 * 2 * 256 * 128


@pytest.mark.parametrize("weights", ["int8", "int8-mlp"])
def test_weights_in_8_bits_and_their_scales_are_read_once(weights: str, found: list[traffic.Traffic]) -> None:
    with torch.inference_mode():
        narrow = traffic.measure(wide(), 2, [5], torch.bfloat16, weights)
    assert all(item.weights_once for item in narrow)
    glu, qkv = next(item for item in narrow if "glu" in item.kernel), next(item for item in narrow if item.weights)
    assert glu.weights == 2 * 256 * (128 + 4)
    before = {item.kernel: item for item in found}
    assert glu.weights + glu.saved == before["rms_norm_glu"].weights
    assert (qkv.saved > 0) == (weights == "int8")
    share = traffic.share_of_float(narrow, 2, 5, 1)
    assert 0.5 < share < 1
    wasteful = [traffic.replace(item, weights=item.weights + item.saved) for item in narrow]
    wasteful[0] = traffic.replace(wasteful[0], saved=0)
    assert any("without weights in 8 bits; 0." in told for told in traffic.violations(wasteful, 1, weights))


def test_attention_moves_the_keys_and_values_of_its_tokens(found: list[traffic.Traffic]) -> None:
    decoder = wide().decoder
    token = 2 * 2 * decoder.num_key_value_heads * decoder.head_dim
    short, long = (item for item in found if item.kernel == "rope_attention")
    assert (short.kv, long.kv) == (2 * 5 * token, 2 * 40 * token)
    [cross] = [item for item in found if item.kernel == "cross_attention"]
    assert cross.kv == 2 * 2 * decoder.cross_num_key_value_heads * decoder.cross_head_dim * traffic.TEXT


def test_a_step_is_added_up_from_its_layers(found: list[traffic.Traffic]) -> None:
    moved, minimum = traffic.whole_step(found, 2, 40, 3)
    one = traffic.whole_step(found, 2, 40, 1)
    layer = [item for item in found if item.kernel not in ("embed_codes", "codebook_logits", "sample")]
    layer = [item for item in layer if item.kernel != "rope_attention" or item.context == 40]
    assert moved - one[0] == 2 * sum(item.moved for item in layer)
    assert 1 <= moved / minimum < 1.1 and len(layer) == 8


@pytest.mark.parametrize("kernel", ["_rms_norm_glu", "_codebook_logits"])
def test_a_kernel_that_reads_its_weights_twice_is_told(kernel: str) -> None:
    def twice(run: launch.Launcher, called: Any, grid: Any, args: Any, meta: Any) -> None:
        run(called, grid, *args, **meta)
        if called.fn.__name__ == kernel:
            run(called, grid, *args, **meta)

    with torch.inference_mode(), launch.listening(twice):
        broken = traffic.measure(wide(), 2, [5], torch.bfloat16)
    told = traffic.violations(broken, 1)
    assert f"{kernel.strip('_')} at 2 rows does not read every weight exactly once" in told
    assert any("x the fewest bytes possible" in sentence for sentence in told)


def test_the_report_says_what_was_counted(found: list[traffic.Traffic]) -> None:
    table = traffic.markdown(found, 1)
    assert f"| `rms_norm_glu` | {2 * 2 * 256 * 128:,} | 0 |" in table
    assert "| 2 | 40 |" in table
