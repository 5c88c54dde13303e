"""Codecs for the original's `Dia`: any behind two functions, ours also behind the interface of `dac.DAC`."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dia_fast.audio.codec import Codec
from dia_fast.audio.codec.network import Codebook, DacNetwork
from dia_fast.errors import InputError, shown
from dia_fast.utils.ambient import isolated

SAMPLE_RATE = 44_100


class SoundCodec(Protocol):
    """Mono sound at 44.1 kHz to codes and back."""

    def encode(self, samples: Tensor) -> Tensor:
        """`[n]` float32 to `[frames, channels]`."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """`[frames, channels]` to `[n]` float32."""
        ...


class _Descript:
    """A `dac.DAC` of descript-audio-codec."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, samples: Tensor) -> Tensor:
        place = next(self.model.parameters())
        return self.model.encode(self.model.preprocess(samples.to(place)[None, None], SAMPLE_RATE))[1][0].T

    def decode(self, codes: Tensor) -> Tensor:
        place = next(self.model.parameters())
        latents = self.model.quantizer.from_codes(codes.to(place.device, torch.int64).T[None])[0]
        return self.model.decode(latents).reshape(-1).float()


class _Transformers:
    """A `transformers.DacModel`, the `audio_tokenizer` of a processor."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, samples: Tensor) -> Tensor:
        hop = self.model.config.hop_length
        padded = torch.nn.functional.pad(samples, (0, -len(samples) % hop))
        place = next(self.model.parameters())
        return self.model.encode(padded.to(place)[None, None]).audio_codes[0].T

    def decode(self, codes: Tensor) -> Tensor:
        codes = codes.to(self.model.device, torch.int64).T[None]
        return self.model.decode(audio_codes=codes).audio_values.reshape(-1).float()


class Encoded(NamedTuple):
    """Result of `dac.DAC.encode`.

    `z` `[batch, hidden, frames]`, codes `[batch, codebooks, frames]` int64, latents `[batch, codebooks * codebook_dim,
    frames]`, and the two losses of its training.
    """

    z: Tensor
    codes: Tensor
    latents: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class _Quantizer:
    """`dac_model.quantizer`: codes to what `decode` takes."""

    def __init__(self, network: DacNetwork) -> None:
        self._network = network
        self.n_codebooks = len(network.quantizer.quantizers)

    @isolated()
    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[batch, codebooks, frames]` to `(z, latents, codes)`; the first codebooks will do."""
        z: Any = 0
        words = []
        for stage, ids in zip(_stages(self._network), codes.unbind(1), strict=False):
            words.append(stage.codebook(ids.long()).transpose(1, 2))
            z = z + stage.out_proj(words[-1])
        return z, torch.cat(words, 1), codes


class DescriptCodec(nn.Module):
    """A `Codec` with the names, shapes and results of descript-audio-codec's `dac.DAC`.

    codec: ours; `to`, `half` and their kin move and convert it.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec, self.network = codec, codec.network
        self.quantizer = _Quantizer(codec.network)
        self.sample_rate, self.hop_length = codec.sample_rate, codec.hop_length
        self.n_codebooks, self.codebook_size = codec.num_codebooks, codec.codebook_size
        self.codebook_dim, self.latent_dim = codec.config.codebook_dim, codec.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.codec.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DescriptCodec":
        super()._apply(fn, recurse)
        weight = self.network.decoder.conv1.weight
        self.codec.device, self.codec.dtype = weight.device, weight.dtype
        self.network.quantizer.finalize()
        return self

    def preprocess(self, audio_data: Tensor, sample_rate: int | None = None) -> Tensor:
        """Samples `[..., n]` with silence behind them, to a whole number of frames. Raises InputError."""
        if sample_rate not in (None, self.sample_rate):
            raise InputError(f"sample_rate must be the codec's {self.sample_rate}, not {shown(sample_rate)}: resample")
        return functional.pad(audio_data, (0, -audio_data.shape[-1] % self.hop_length))

    @isolated()
    def encode(self, audio_data: Tensor, n_quantizers: int | None = None) -> Encoded:
        """Samples `[batch, 1, n]`, as `preprocess` leaves them. n_quantizers: the first codebooks alone."""
        if audio_data.dim() != 3 or audio_data.shape[1] != 1:
            raise InputError(f"audio_data must have shape [batch, 1, n], not {list(audio_data.shape)}")
        wave = self.preprocess(audio_data).to(self.codec.device, self.network.encoder.conv1.weight.dtype)
        left = torch.cat([self.network.encoder(item[None]) for item in wave])
        z, ids, latents = torch.zeros_like(left), [], []
        loss = torch.zeros((), device=left.device, dtype=left.dtype)
        for stage in _stages(self.network)[:n_quantizers]:
            latent = stage.in_proj(left)
            chosen, part = stage.nearest(left)
            z, left = z + part, left - part
            ids.append(chosen)
            latents.append(latent)
            loss = loss + functional.mse_loss(latent, stage.codebook(chosen).transpose(1, 2))
        return Encoded(z, torch.stack(ids, 1), torch.cat(latents, 1), loss, loss.clone())

    @isolated()
    def decode(self, z: Tensor) -> Tensor:
        """`z` of `encode` or of `quantizer.from_codes` to samples `[batch, 1, n]`."""
        z = z.to(self.codec.device, self.codec.dtype)
        return torch.cat([self.network.decoder(item[None]) for item in z])

    def forward(
        self, audio_data: Tensor, sample_rate: int | None = None, n_quantizers: int | None = None
    ) -> dict[str, Any]:
        """There and back, by the names of `dac.DAC.forward`."""
        encoded = self.encode(self.preprocess(audio_data, sample_rate), n_quantizers)
        losses = {"vq/commitment_loss": encoded.commitment_loss, "vq/codebook_loss": encoded.codebook_loss}
        names = {"z": encoded.z, "codes": encoded.codes, "latents": encoded.latents}
        return {"audio": self.decode(encoded.z)[..., : audio_data.shape[-1]]} | names | losses


def _stages(network: DacNetwork) -> list[Codebook]:
    return list(cast("Iterable[Codebook]", network.quantizer.quantizers))


def as_module(model: Any) -> Any:
    """A codec as `Dia.dac_model` holds it: ours behind the interface of `dac.DAC`, others as they are."""
    if not isinstance(model, Codec):
        return model
    return DescriptCodec(model) if isinstance(model.network, DacNetwork) else model.network.model


def as_codec(model: Any) -> SoundCodec:
    """The interface above for a `Codec`, a `dac.DAC` or a `transformers.DacModel`. Raises InputError for others."""
    if isinstance(model, Codec):
        return model
    if isinstance(model, DescriptCodec):
        return model.codec
    if hasattr(model, "preprocess") and hasattr(model, "quantizer"):
        return _Descript(model)
    if hasattr(model, "encode") and hasattr(getattr(model, "config", None), "downsampling_ratios"):
        return _Transformers(model)
    raise InputError(
        f"dac_model must be a dac.DAC, a transformers.DacModel or a Codec of dia_fast, not {type(model).__name__}"
    )
