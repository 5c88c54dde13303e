"""A small codec, and descript-audio-codec itself where it is installed."""

import importlib.util
import sys
import types
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dia_fast.audio.codec import Codec, CodecConfig
from dia_fast.audio.codec.codec import build_codec
from tests.helpers.tolerance import of_weights

SMALL = CodecConfig(
    encoder_hidden_size=4,
    downsampling_ratios=(2, 4),
    decoder_hidden_size=16,
    n_codebooks=3,
    codebook_size=32,
    codebook_dim=4,
    sampling_rate=8_000,
)


def random_codes(frames: int, config: CodecConfig = SMALL) -> torch.Tensor:
    return torch.randint(0, config.codebook_size, (frames, config.n_codebooks))


def ops_with(activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> types.ModuleType:
    """The codec's op set around any activation of x `[batch, channels, samples]` and alpha `[channels, 1]`."""

    def snake(x: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(activation(x, alpha[:, None]))

    def snake_residual(
        x: torch.Tensor, residual: torch.Tensor, alpha: torch.Tensor, total: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        torch.add(x, residual, out=total)
        return snake(total, alpha, out)

    ops = types.ModuleType("ops")
    vars(ops).update(snake=snake, snake_residual=snake_residual)
    return ops


def exact_ops() -> types.ModuleType:
    """Snake in the dtype of its input, for codecs in fp64; the reference computes in fp32 whatever it is given."""
    return ops_with(lambda x, alpha: x + torch.sin(alpha * x).square() / (alpha + 1e-9))


def imported_dac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """For a fixture: the package `dac`, for one test; skips where it is not installed.

    Its dependency audiotools, of which encode and decode use only a base class, is stood in for: it needs torchaudio
    and some fifty more packages.
    """
    for name in ("dac", "argbind", "einops"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    audiotools, ml = types.ModuleType("audiotools"), types.ModuleType("audiotools.ml")
    core, util = types.ModuleType("audiotools.core"), types.ModuleType("audiotools.core.util")

    class BaseModel(torch.nn.Module):
        INTERN: list[str] = []
        EXTERN: list[str] = []

    vars(ml).update(BaseModel=BaseModel, Accelerator=object)
    vars(core).update(util=util)
    vars(audiotools).update(ml=ml, core=core, AudioSignal=object, STFTParams=namedtuple("STFTParams", "window_length"))
    for module in (audiotools, ml, core, util):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    import dac

    yield dac
    for name in [name for name in sys.modules if name == "dac" or name.startswith("dac.")]:
        del sys.modules[name]  # built upon the stand-ins


_ROUNDING: dict[tuple[Any, ...], float] = {}


def rounding_of(codec: Codec) -> float:
    """The largest error of a codec's sound on this machine, in units of full scale, over some random codes.

    The worst of four evaluations, three of them with weights moved by one rounding of the codec's dtype, against
    float64. `dtype` of the weights decides, so a codec in half precision has a large one.
    """
    tensors = codec.network.tensors()
    key = (codec.config, codec.dtype, *(float(tensor.double().abs().sum()) for tensor in tensors.values()))
    if key not in _ROUNDING:
        wide = {name: tensor.cpu().double() for name, tensor in tensors.items()}
        twin = build_codec(codec.config, wide, "float64", torch.device("cpu"), torch.float64, exact_ops())
        frames = max(16, 4096 // codec.hop_length)
        shape = (frames, codec.num_codebooks)
        codes = torch.randint(0, codec.codebook_size, shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            exact = twin.network.decode(codes.T[None])[0, 0]
        plain = of_weights(codec.network, lambda: codec.decode(codes).cpu().double(), 4)
        _ROUNDING[key] = max(float((item - exact).abs().max()) for item in plain)
        assert _ROUNDING[key] > 0
    return _ROUNDING[key]


def assert_same_sound(found: Any, expected: Any, codec: Codec) -> None:
    """Assert that two sounds of a codec differ by rounding alone: each may be twice as far off as `rounding_of`."""
    found, expected = (torch.as_tensor(sound).detach().cpu().double() for sound in (found, expected))
    assert found.shape == expected.shape, f"{tuple(found.shape)} samples instead of {tuple(expected.shape)}"
    difference, allowed = float((found - expected).abs().max()) if len(found) else 0.0, 4 * rounding_of(codec)
    assert difference <= allowed, f"{difference:.2e} of full scale, {difference / allowed:.2f} x what rounding explains"
