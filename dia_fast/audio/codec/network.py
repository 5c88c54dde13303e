"""The Descript Audio Codec (Kumar et al. 2023, arXiv 2306.06546) for inference: encoder, residual quantiser, decoder.

Modules and parameters carry the names of the transformers layout, so that a network's state dict is such a file.
Snake activations go through an op set of `dia_kernels`; convolutions are torch's. Weight norm is folded before loading.
"""

import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dia_fast.audio.codec.config import DILATIONS, KERNEL, CodecConfig
from dia_fast.errors import NumericError

FEW_FRAMES = 32  # the first convolution of the decoder sees no fewer


class Snake(nn.Module):
    """Holds the one parameter of a Snake activation, `alpha` `[1, channels, 1]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, dtype=torch.float32, device="meta"))


class DilatedConv1d(nn.Conv1d):
    """`[1, channels, samples]` -> the same shape.

    On a CPU as a plain convolution over the samples that are `dilation` apart, one batch item for each of the first
    `dilation` samples: faster there, and the sums do not depend on how many samples there are, as they do in torch's
    dilated convolution. Pieces of a signal then give what the whole gives.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__(channels, channels, KERNEL, dilation=dilation, padding=KERNEL // 2 * dilation)

    def forward(self, x: Tensor) -> Tensor:
        step, samples = self.dilation[0], x.shape[-1]
        if step == 1 or x.device.type != "cpu":
            return super().forward(x)
        apart = functional.pad(x[0], (0, -samples % step)).unflatten(-1, (-1, step)).permute(2, 0, 1).contiguous()
        y = functional.conv1d(apart, self.weight, self.bias, padding=KERNEL // 2)
        return y.permute(1, 2, 0).flatten(1)[None, :, :samples].contiguous()


class ResidualUnit(nn.Module):
    """Parameters of Snake, dilated convolution, Snake, pointwise convolution."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = DilatedConv1d(channels, dilation)
        self.snake2 = Snake(channels)
        self.conv2 = nn.Conv1d(channels, channels, 1)


class EncoderBlock(nn.Module):
    """Three residual units, then a strided convolution: twice the channels, samples / stride."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(channels, dilation) for dilation in DILATIONS)
        self.snake1 = Snake(channels)
        self.conv1 = nn.Conv1d(channels, 2 * channels, 2 * stride, stride=stride, padding=math.ceil(stride / 2))

    @property
    def units(self) -> tuple[ResidualUnit, ...]:
        return self.res_unit1, self.res_unit2, self.res_unit3


class DecoderBlock(nn.Module):
    """A transposed convolution (half the channels, samples x stride), then three residual units."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.snake1 = Snake(channels)
        self.conv_t1 = nn.ConvTranspose1d(channels, half, 2 * stride, stride=stride, padding=math.ceil(stride / 2))
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(half, dilation) for dilation in DILATIONS)

    @property
    def units(self) -> tuple[ResidualUnit, ...]:
        return self.res_unit1, self.res_unit2, self.res_unit3


class Encoder(nn.Module):
    """`[1, 1, samples]` -> `[1, hidden, samples / hop]`; samples must be a multiple of the hop."""

    def __init__(self, config: CodecConfig, ops: ModuleType) -> None:
        super().__init__()
        self.ops = ops
        width = config.encoder_hidden_size
        self.conv1 = nn.Conv1d(1, width, KERNEL, padding=KERNEL // 2)
        self.block = nn.ModuleList()
        for stride in config.downsampling_ratios:
            self.block.append(EncoderBlock(width, stride))
            width *= 2
        self.snake1 = Snake(width)
        self.conv2 = nn.Conv1d(width, config.hidden_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in cast("Iterable[EncoderBlock]", self.block):
            x = block.conv1(_units_then_snake(self.ops, block.units, block.snake1, x))
        return self.conv2(_snake(self.ops, self.snake1, x))


class Decoder(nn.Module):
    """`[1, hidden, frames]` -> `[1, 1, samples]`, between -1 and 1."""

    def __init__(self, config: CodecConfig, ops: ModuleType) -> None:
        super().__init__()
        self.ops = ops
        width = config.decoder_hidden_size
        self.conv1 = nn.Conv1d(config.hidden_size, width, KERNEL, padding=KERNEL // 2)
        self.block = nn.ModuleList()
        for stride in config.upsampling_ratios:
            self.block.append(DecoderBlock(width, stride))
            width //= 2
        self.snake1 = Snake(width)
        self.conv2 = nn.Conv1d(width, 1, KERNEL, padding=KERNEL // 2)

    def forward(self, z: Tensor) -> Tensor:
        blocks = list(cast("Iterable[DecoderBlock]", self.block))
        frames = z.shape[-1]
        # Zeros beyond the end are what it pads with; with few frames it sums in another order than with many, on a CPU.
        x = self.conv1(functional.pad(z, (0, max(0, FEW_FRAMES - frames))))[..., :frames].contiguous()
        active = _snake(self.ops, blocks[0].snake1, x)
        # The Snake that follows a block (the next one's, or the last) is fused with the end of its last residual unit.
        for block, following in zip(blocks, [*(block.snake1 for block in blocks[1:]), self.snake1], strict=True):
            active = _units_then_snake(self.ops, block.units, following, block.conv_t1(active))
        return torch.tanh(self.conv2(active))


class Codebook(nn.Module):
    """One stage of the quantiser: `[1, hidden, frames]` <-> ids `[1, frames]` of the codewords nearest in direction."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(config.hidden_size, config.codebook_dim, 1)
        self.out_proj = nn.Conv1d(config.codebook_dim, config.hidden_size, 1)
        # From an empty tensor: drawing normal numbers on the meta device would import half of torch's compiler.
        self.codebook = nn.Embedding.from_pretrained(
            torch.empty(config.codebook_size, config.codebook_dim, dtype=torch.float32, device="meta")
        )

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, and what they stand for in `z`'s space. Distances are measured between unit vectors, in fp32."""
        latent = self.in_proj(z)
        directions = functional.normalize(latent.float().transpose(1, 2), dim=-1)
        codewords = functional.normalize(self.codebook.weight.float(), dim=-1)
        # |a - b|^2 = |a|^2 - 2ab + |b|^2, of which |a|^2 is the same for every codeword.
        ids = (2 * directions @ codewords.T - codewords.square().sum(1)).argmax(dim=-1)
        word = self.codebook(ids).transpose(1, 2)
        # Equal to `word` but for rounding. Published encoders keep this leftover of training's straight-through
        # estimator, and later stages see its rounding.
        return ids, self.out_proj(latent + (word - latent))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out_proj(self.codebook(ids).transpose(1, 2))


class Quantizer(nn.Module):
    """Codebooks, each of which codes what the ones before it left over."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Codebook(config) for _ in range(config.n_codebooks))
        self._table_of: tuple[object, Tensor] | None = None

    def encode(self, z: Tensor) -> Tensor:
        """`[1, hidden, frames]` -> ids `[1, codebooks, frames]` int64."""
        ids = []
        for stage in cast("Iterable[Codebook]", self.quantizers):
            chosen, part = stage.nearest(z)
            z = z - part
            ids.append(chosen)
        return torch.stack(ids, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Ids `[1, codebooks, frames]` -> `[1, hidden, frames]`."""
        dtype = cast("Codebook", self.quantizers[0]).codebook.weight.dtype
        return self.gather_sum(codes.transpose(1, 2), dtype)

    def gather_sum(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Ids `[batch, frames, codebooks]` int64 -> `[batch, hidden, frames]`: for each frame a sum of table rows."""
        table = self.finalize()
        size = len(table) // len(self.quantizers)
        ids = codes + torch.arange(0, len(table), size, dtype=torch.int64, device=codes.device)
        z = functional.embedding_bag(ids.flatten(0, 1), table, mode="sum")
        return z.unflatten(0, codes.shape[:2]).transpose(1, 2).to(dtype).contiguous()

    def finalize(self) -> Tensor:
        """Compute what the codebooks add, `[codebooks * size, hidden]` in fp32 or wider, where the weights are new.

        Call it before threads decode on streams of their own: none of them has to compute it then. Nobody gets a table
        that another stream still writes.
        """
        stages = list(cast("Iterable[Codebook]", self.quantizers))
        weights = [(s.codebook.weight, s.out_proj.weight, cast("Tensor", s.out_proj.bias)) for s in stages]
        key = [(part.data_ptr(), part.device, part.dtype, part._version) for parts in weights for part in parts]
        if self._table_of is None or self._table_of[0] != key:
            wide = torch.float64 if weights[0][0].dtype == torch.float64 else torch.float32
            parts = [functional.linear(c.to(wide), w[..., 0].to(wide), b.to(wide)) for c, w, b in weights]
            table = torch.cat(parts)
            if table.device.type == "cuda":
                torch.cuda.current_stream(table.device).synchronize()
            self._table_of = key, table
        return self._table_of[1]


class DacNetwork(nn.Module):
    """The whole codec. `encode`: `[1, 1, samples]` -> `[1, codebooks, frames]`; `decode`: back to `[1, 1, samples]`."""

    def __init__(self, config: CodecConfig, ops: ModuleType) -> None:
        super().__init__()
        self.encoder = Encoder(config, ops)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config, ops)

    def encode(self, samples: Tensor) -> Tensor:
        latent = self.encoder(samples)
        if not latent.isfinite().all():
            raise NumericError("the codec's encoder gives NaN or infinity; is the recording louder than -1 to 1?")
        return self.quantizer.encode(latent)

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.quantizer.decode(codes))

    def tensors(self) -> dict[str, Tensor]:
        """All weights under their names in the transformers layout."""
        return self.state_dict()


def _snake(ops: ModuleType, snake: Snake, x: Tensor) -> Tensor:
    """Into x's own memory: Snake reads every element once, before it writes it."""
    return ops.snake(x, snake.alpha.view(-1), x)


def _units_then_snake(ops: ModuleType, units: Sequence[ResidualUnit], last: Snake, x: Tensor) -> Tensor:
    """`last(units[2](units[1](units[0](x))))`, `[1, channels, samples]`; overwrites x.

    Each sum is fused with the activation that reads it. A long decode is bound by memory, so both results go where an
    input lay: at most four tensors of this size are alive.
    """
    active = ops.snake(x, units[0].snake1.alpha.view(-1), torch.empty_like(x))
    for unit, following in zip(units, [*(unit.snake1 for unit in units[1:]), last], strict=True):
        y = _snake(ops, unit.snake2, unit.conv1(active))
        y = unit.conv2(y)
        active = ops.snake_residual(y, x, following.alpha.view(-1), x, y)
    return active
