"""The decoder piece by piece, for many streams at once: every convolution keeps the columns that the next piece needs.

A layer gets the columns of a piece behind those it kept, and gives as many as fit: it is late by half its kernel.
A stream keeps:

    conv1           6 columns of its input                         late by 3 columns
    conv_t1 (s, 2s) 1 column of its input, after the Snake         late by ceil(s / 2) columns of its output
    residual unit   6 * dilation columns of x                      late by 3 * dilation
    conv2           6 columns of its input, after the Snake        late by 3

The samples of all pieces, joined, are those of the whole: no frame is computed twice. Columns before the first and
after the last of a stream are zeros, as padding is, and not what a bias makes of zeros: they are masked by their index.
"""

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dia_fast.audio.codec.config import DILATIONS, KERNEL, CodecConfig
from dia_fast.audio.codec.network import DacNetwork, DecoderBlock, ResidualUnit, Snake

OPEN = 1 << 40  # the end of a stream that is not known yet, in frames

FEW_COLUMNS = 22  # of a convolution's input: 16 of its output, for the longest kernel

_KEPT, _LATE = KERNEL - 1, KERNEL // 2


class IncrementalDecoder:
    """Decodes pieces of streams, and keeps what the next piece of each needs.

    Convolutions compute in the dtype of their weights; Snake, sums and what is kept are in fp32 (in fp64 for weights in
    fp64).

    Args:
        network: The codec.
        streams: Numbered from 0. One more is there for batch rows that are not used.
    """

    def __init__(self, network: DacNetwork, config: CodecConfig, streams: int) -> None:
        self.network, self.config, self.streams = network, config, streams
        weight = network.decoder.conv1.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        shapes = list(_kept_shapes(config))
        sizes = [channels * columns for channels, columns in shapes]
        self._all = torch.zeros(streams + 1, sum(sizes), dtype=self.wide, device=self.device)
        parts = zip(self._all.split(sizes, 1), shapes, strict=True)
        self._kept = [part.unflatten(1, shape) for part, shape in parts]

    @property
    def bytes_per_stream(self) -> int:
        """Size of what is kept of one stream."""
        return self._all[0].numel() * self._all.element_size()

    def first_sample(self, fed: int) -> int:
        """Index in its stream of the first sample that the piece from frame `fed` on gives; below 0, there is none."""
        first = fed - _LATE
        for stride in self.config.upsampling_ratios:
            first = first * stride - math.ceil(stride / 2) - _LATE * sum(DILATIONS)
        return first - _LATE

    def clear(self, stream: int) -> None:
        """Begin a stream anew."""
        self._all[stream].zero_()

    def grown(self, streams: int) -> "IncrementalDecoder":
        """A decoder for more streams that goes on with those of this one."""
        other = IncrementalDecoder(self.network, self.config, streams)
        other._all[: self.streams] = self._all[: self.streams]
        return other

    def step(self, streams: Tensor, fed: Tensor, end: Tensor, codes: Tensor, *, inside: bool = False) -> Tensor:
        """Decode one piece of each stream.

        Args:
            streams: Their numbers, `[batch]` int64, each once.
            fed: Frames of each before this piece, `[batch]` int64.
            end: Frames of each in all, `[batch]` int64; `OPEN` where that is not known.
            codes: `[batch, n, codebooks]` int64; behind the end of a stream any that are valid.
            inside: The pieces lie so far from either end of their streams that nothing is to be masked.

        Returns:
            Samples `[batch, n * hop_length]` in fp32 or fp64, of each stream from `first_sample(fed)` on.
        """
        piece = _Piece(self, streams, fed, end, inside)
        decoder, ops = self.network.decoder, self.network.decoder.ops
        z = self.network.quantizer.gather_sum(codes, self.wide)
        x = piece.masked(self._conv(piece.keep(piece.masked(z)), decoder.conv1), late=_LATE)
        del z
        for block in cast("Iterable[DecoderBlock]", decoder.block):
            conv = block.conv_t1
            stride = conv.stride[0]
            x = piece.keep(_snake(ops, block.snake1, x))
            count = x.shape[-1]
            x = functional.conv_transpose1d(self._operand(x), conv.weight, conv.bias, stride=stride)
            piece.upsampled(stride)
            # The first column that was kept completes outputs `stride`..; the last one only begins those behind it.
            x = piece.masked(x[..., stride : count * stride].to(self.wide), late=math.ceil(stride / 2))
            for unit in block.units:
                whole = piece.keep(x)
                del x
                x = self._unit(piece, unit, whole)
                del whole
        x = piece.keep(_snake(ops, decoder.snake1, x))
        return torch.tanh(self._conv(x, decoder.conv2))[:, 0]

    def _unit(self, piece: "_Piece", unit: ResidualUnit, whole: Tensor) -> Tensor:
        ops, dilation = self.network.decoder.ops, unit.conv1.dilation[0]
        count = whole.shape[-1] - _KEPT * dilation
        y = self._dilated(_snake(ops, unit.snake1, whole, torch.empty_like(whole)), unit.conv1)
        y = self._conv(_snake(ops, unit.snake2, y), unit.conv2)
        y += whole[..., _LATE * dilation : _LATE * dilation + count]
        return piece.masked(y, late=_LATE * dilation)

    def _conv(self, x: Tensor, conv: nn.Conv1d) -> Tensor:
        count, dilation = x.shape[-1] - conv.dilation[0] * (conv.kernel_size[0] - 1), conv.dilation
        y = functional.conv1d(self._operand(x), conv.weight, conv.bias, dilation=dilation)
        return y[..., :count].to(self.wide)

    def _operand(self, x: Tensor) -> Tensor:
        """In the dtype of the weights. On a CPU few columns are summed in another order than many: zeros make more."""
        few = FEW_COLUMNS - x.shape[-1] if self.device.type == "cpu" else 0
        return functional.pad(x, (0, few)).to(self.dtype) if few > 0 else x.to(self.dtype)

    def _dilated(self, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """On a CPU as `DilatedConv1d` does it."""
        step = conv.dilation[0]
        if step == 1 or x.device.type != "cpu":
            return self._conv(x, conv)
        batch, channels, columns = x.shape
        full, rest = divmod(columns, step)
        apart = x.new_zeros(batch, step, channels, full + (rest > 0))
        apart[..., :full] = x[..., : full * step].unflatten(-1, (full, step)).permute(0, 3, 1, 2)
        apart[:, :rest, :, full:] = x[..., full * step :].transpose(1, 2)[..., None]
        del x
        count = apart.shape[-1] - _KEPT
        y = functional.conv1d(self._operand(apart.flatten(0, 1)), conv.weight, conv.bias)[..., :count]
        del apart
        y = y.to(self.wide).unflatten(0, (batch, step)).permute(0, 2, 3, 1).flatten(2)
        return y[..., : columns - _KEPT * step]


class _Piece:
    """One step on its way through the layers: what each has kept, and where in the streams its columns lie."""

    def __init__(self, decoder: IncrementalDecoder, streams: Tensor, fed: Tensor, end: Tensor, inside: bool) -> None:
        self._kept = iter(decoder._kept)
        self._streams, self._first, self._end, self._inside = streams, fed, end, inside

    def keep(self, x: Tensor) -> Tensor:
        """The columns that the next layer kept, then x; keeps the last ones for the next piece."""
        kept = next(self._kept)
        whole = torch.cat((kept.index_select(0, self._streams), x), -1)
        kept.index_copy_(0, self._streams, whole[..., whole.shape[-1] - kept.shape[-1] :])
        return whole

    def upsampled(self, stride: int) -> None:
        """From now on columns are those of the next rate."""
        if not self._inside:
            self._first, self._end = self._first * stride, self._end * stride - stride % 2

    def masked(self, x: Tensor, late: int = 0) -> Tensor:
        """X with zeros where it lies outside of its stream. late: by how many columns more than before."""
        if self._inside:
            return x
        self._first = self._first - late
        at = self._first[:, None] + torch.arange(x.shape[-1], dtype=torch.int64, device=x.device)
        return x * ((at >= 0) & (at < self._end[:, None]))[:, None].to(x.dtype)


def _snake(ops: object, snake: Snake, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Into x's own memory, or into `out`."""
    x = x.contiguous()
    return ops.snake(x, snake.alpha.view(-1), x if out is None else out)  # type: ignore[attr-defined]


def _kept_shapes(config: CodecConfig) -> Iterator[tuple[int, int]]:
    """Channels and columns of what each layer keeps, in their order."""
    yield config.hidden_size, _KEPT
    width = config.decoder_hidden_size
    for _ in config.upsampling_ratios:
        yield width, 1
        width //= 2
        for dilation in DILATIONS:
            yield width, _KEPT * dilation
    yield width, _KEPT
