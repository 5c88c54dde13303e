"""The codec as the rest of the package sees it: samples in, frames of codes out, and back."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dia_fast.audio.codec.config import CodecConfig
from dia_fast.audio.codec.incremental import IncrementalDecoder
from dia_fast.audio.codec.network import DacNetwork
from dia_fast.audio.codec.stage import SPAN, CodecStream, Stage, decode_long
from dia_fast.audio.codec.weights import check_tensors, write_transformers
from dia_fast.errors import InputError, NumericError
from dia_fast.utils.ambient import exact_convolutions, isolated
from dia_fast.utils.cuda_graphs import CudaGraphs
from dia_fast.utils.forks import OneProcess, renew_in_child
from dia_fast.utils.values import tensor_of, whole_number
from dia_kernels import reference

_Result = TypeVar("_Result")

_HELP = (
    "its weights may be damaged; get them again",
    "values have grown too large for float16, or its weights are damaged; use bfloat16 or float32",
)


class Codec(OneProcess):
    """A neural audio codec on one device. Made by `load_codec` or `random_codec`.

    In float32 it computes in float32 throughout, never in TF32: the mode for comparisons. Float16 is the mode for
    serving on a GPU: operands of the decoder's convolutions in float16, all else in float32, the encoder too, so that a
    recording has the same codes; its error is far below the signal, and less than bfloat16 has.

    Args:
        network: Has `encode`, `decode` and `tensors` as `DacNetwork` does.
        config: Of the network.
        device: Of its weights.
        dtype: Of its weights; of a `DacNetwork` in 16 bits those of the decoder alone.
    """

    @isolated()
    def __init__(self, network: Any, config: CodecConfig, device: torch.device, dtype: torch.dtype) -> None:
        narrow = dtype in (torch.float16, torch.bfloat16) and isinstance(network, DacNetwork)
        self.network = network.to(device=device, dtype=torch.float32 if narrow else dtype).eval().requires_grad_(False)
        if isinstance(network, DacNetwork):
            network.decoder.to(dtype)
            network.quantizer.finalize()
        self.config = config
        self.device = device
        self.dtype = dtype
        self.stage: Stage | None = None
        self._cuda: torch.cuda.Stream | None = None
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._making = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def _input_dtype(self) -> torch.dtype:
        return self.network.encoder.conv1.weight.dtype if isinstance(self.network, DacNetwork) else self.dtype

    @property
    def sample_rate(self) -> int:
        """Samples per second, in and out."""
        return self.config.sampling_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def frames_per_second(self) -> float:
        """Frames of codes per second of sound."""
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self.config.n_codebooks

    @property
    def codebook_size(self) -> int:
        """Codes are 0 to `codebook_size - 1`."""
        return self.config.codebook_size

    @property
    def decode_context_frames(self) -> int:
        """Frames on either side that the samples of a frame depend on."""
        return self.config.decode_context_frames

    def __repr__(self) -> str:
        return (
            f"Codec({self.sample_rate} Hz, {self.num_codebooks} x {self.codebook_size} codes per {self.hop_length} "
            f"samples, {self.dtype} on {self.device})"
        )

    @isolated()
    @exact_convolutions()
    def encode(self, samples: Tensor | np.ndarray) -> Tensor:
        """Encode sound. The end is padded with silence to a whole number of frames.

        Args:
            samples: Mono, `[n]` floating point at `sample_rate`.

        Returns:
            Codes, `[frames, num_codebooks]` int64 on the device; `frames = ceil(n / hop_length)`.

        Raises:
            InputError: For no samples, another shape or dtype, and for NaN or infinity.
            NumericError: Where what the network makes of the samples is not finite.
        """
        if not isinstance(samples, Tensor | np.ndarray):
            raise InputError(f"samples: expected a torch tensor or numpy array, got {type(samples).__name__}")
        wave = tensor_of("samples", samples)
        if not wave.is_floating_point():
            raise InputError(f"samples: expected floating point from -1 to 1, got {wave.dtype}")
        if wave.dim() != 1 or not len(wave):
            raise InputError(f"samples: expected mono, shape [n] with n >= 1, got {list(wave.shape)}")
        if not wave.isfinite().all():
            raise InputError(f"samples: sample {int((~wave.isfinite()).nonzero()[0, 0])} is not a finite number")
        wave = functional.pad(wave.to(self.device, self._input_dtype), (0, -len(wave) % self.hop_length))
        if not wave.isfinite().all():
            raise InputError(f"samples: some are too large for {self._input_dtype}; full scale is from -1 to 1")
        return self.network.encode(wave[None, None])[0].T.contiguous()

    @isolated()
    @exact_convolutions()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to sound.

        A long sound is decoded in spans of 64 frames, which bounds the memory. With weights in float16 or bfloat16
        the convolutions alone compute in that dtype: activations, residual sums and what is kept stay in float32.

        Args:
            codes: `[frames, num_codebooks]`, integers from 0 to `codebook_size - 1`.

        Returns:
            Samples, `[n]` float32 on the device; `n = frames * hop_length` (a few less if an upsampling ratio is odd,
            as none is in Dia's codec).

        Raises:
            InputError: For another shape or dtype and for a code outside the codebook.
            NumericError: Where the sound comes out as NaN or infinity.
        """
        self.check_codes(codes)
        if not len(codes):
            return torch.zeros(0, device=self.device, dtype=torch.float32)
        codes = codes.to(self.device, torch.int64)
        narrow = self.dtype in (torch.float16, torch.bfloat16)
        if isinstance(self.network, DacNetwork) and (narrow or len(codes) > SPAN):
            wave = torch.empty(self.config.samples_of(len(codes)), device=self.device, dtype=torch.float32)
            decode_long(IncrementalDecoder(self.network, self.config, 1), codes, wave)
        else:
            wave = self.network.decode(codes.T[None])[0, 0].float()
        if not wave.isfinite().all():
            raise NumericError(self.not_finite)
        return wave

    @property
    def not_finite(self) -> str:
        """The message about sound that is NaN or infinity."""
        return f"the codec's sound is NaN or infinity: {_HELP[self.dtype == torch.float16]}"

    @isolated()
    def stream(self) -> "CodecStream | _Spans":
        """Begin to decode a sound whose frames come one after another: call `decode_span` for each span, in order.

        Frames are computed once, in batches with those of other streams, in a thread that the codec keeps for it. The
        `dac` package's own network decodes each span anew, with its context.
        """
        if not isinstance(self.network, DacNetwork):
            return _Spans(self)
        with self._making:
            if self.stage is None:
                self.stage = Stage(self, CudaGraphs() if self.device.type == "cuda" else None)
            return self.stage.open()

    def in_thread(self, work: Callable[..., _Result], *inputs: Any) -> Future[_Result]:
        """Have something done by a thread, and on a CUDA stream, that the codec keeps for whole sounds; one by one.

        Args:
            work: Called with the inputs.
            *inputs: Whatever it takes.
        """
        with self._making:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "dia-fast-decode")
            return self._pool.submit(self._on_own_stream, work, *inputs)

    def _on_own_stream(self, work: Callable[..., _Result], *inputs: Any) -> _Result:
        if self.device.type != "cuda":
            return work(*inputs)
        with torch.cuda.device(self.device):
            if self._cuda is None:
                self._cuda = torch.cuda.Stream()
                self._cuda.wait_stream(torch.cuda.default_stream())  # the weights may still be on their way
            with torch.cuda.stream(self._cuda):
                return work(*inputs)

    @isolated()
    @exact_convolutions()
    def decode_span(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """Decode a span of frames as `decode(codes)` does, at the price of those frames and their context.

        The sound of consecutive spans, joined, is the whole to 1e-6 on a CPU, single frames to 1.4e-6: a sum here and
        there rounds differently. A span is final as soon as `codes` holds `decode_context_frames` frames beyond
        `stop`, or all there will be.

        Args:
            codes: As in `decode`.
            start: First frame of the span.
            stop: The frame after the last one.

        Returns:
            Samples as from `decode`.

        Raises:
            InputError: For a span outside `codes`, and as `decode` does.
        """
        self.check_codes(codes)
        start, stop = whole_number("start", start, -(1 << 63)), whole_number("stop", stop, -(1 << 63))
        if not 0 <= start <= stop <= len(codes):
            raise InputError(f"frames {start} to {stop} are not a span of the {len(codes)} frames in codes")
        first = max(0, start - self.decode_context_frames)
        piece = self.decode(codes[first : stop + self.decode_context_frames])
        return piece[(start - first) * self.hop_length : (stop - first) * self.hop_length]

    @isolated()
    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the codec in the transformers layout.

        Args:
            folder: Made if needed.

        Raises:
            InputError: If that fails.
        """
        return write_transformers(folder, self.config, self.network.tensors())

    def check_codes(self, codes: Tensor) -> None:
        """Check that codes can be decoded.

        Args:
            codes: `[frames, num_codebooks]` integers from 0 to `codebook_size - 1`.

        Raises:
            InputError: For anything else.
        """
        if (
            not isinstance(codes, Tensor)
            or codes.is_floating_point()
            or codes.is_complex()
            or codes.dtype == torch.bool
        ):
            kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise InputError(f"codes: expected an integer tensor, got {kind}")
        codes = tensor_of("codes", codes)
        if codes.dim() != 2 or codes.shape[1] != self.num_codebooks:
            raise InputError(f"codes: expected shape [frames, {self.num_codebooks}], got {list(codes.shape)}")
        outside = (codes < 0) | (codes >= self.codebook_size)
        if outside.any():
            frame, channel = (int(index) for index in outside.nonzero()[0])
            raise InputError(
                f"codes: {int(codes[frame, channel])} at frame {frame}, channel {channel} is outside "
                f"0..{self.codebook_size - 1}"
            )


class _Spans:
    """As `CodecStream`, for a network that keeps nothing between spans."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def decode_span(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """See `Codec.decode_span`; on the CPU."""
        return self._codec.decode_span(codes, start, stop).cpu()


@isolated()
def build_codec(
    config: CodecConfig,
    tensors: dict[str, Tensor],
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    ops: ModuleType | None,
) -> Codec:
    """The native codec around loaded tensors. Raises CheckpointError, naming `source`, if they do not fit `config`."""
    with torch.device("meta"):
        network = DacNetwork(config, reference if ops is None else ops)
    check_tensors(tensors, {name: tensor.shape for name, tensor in network.state_dict().items()}, source)
    network.load_state_dict(tensors, assign=True)
    return Codec(network, config, device, dtype)


@isolated()
def random_codec(
    config: CodecConfig,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    ops: ModuleType | None = None,
) -> Codec:
    """A codec with random weights, the same ones for the same config and seed. It speaks noise; for demos and tests.

    Weights are scaled by the inputs that each output sums, so that signals neither die out nor saturate on their way.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DacNetwork(config, reference).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        if name.endswith("alpha"):
            tensor = tensor.mul_(0.1).exp_()
        elif name.endswith("bias"):
            tensor.mul_(0.01)
        elif name.endswith("conv_t1.weight"):  # [in, out, 2 * stride]: each output sample sees two taps of every input
            tensor.div_((2 * shape[0]) ** 0.5)
        elif not name.endswith("codebook.weight"):  # [out, in, kernel]
            tensor.div_((shape[1] * shape[2]) ** 0.5)
        if name.endswith(("res_unit1.conv2.weight", "res_unit2.conv2.weight", "res_unit3.conv2.weight")):
            tensor.mul_(0.3)  # added to a residual stream that should not double with every unit
        elif name == "decoder.conv2.weight":
            tensor.mul_(0.02)  # the sum of nine codebooks comes out at a fifth of full scale
        tensors[name] = tensor
    return build_codec(config, tensors, "random weights", torch.device(device), dtype, ops)
