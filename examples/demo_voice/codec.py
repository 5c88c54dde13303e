"""Trains the small codec of the demo voice: a DAC at 16 kHz, 9 codebooks of 256 codes, 50 frames a second.

    python -m examples.demo_voice.codec SPEECH CODEC --steps 4000 [--warm-start OTHER_CODEC] [--device cuda]

No adversary: distances between spectrograms at six resolutions, and between waveforms. It first learns to pass sound
through without codes; then the codebooks are filled with what comes by, and codes are learnt. A run that was stopped
goes on from its last state; with a larger number of steps, so does one that was finished.
"""

import argparse
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dia_fast.audio.codec import Codec, CodecConfig, load_codec, random_codec
from dia_fast.audio.codec.network import Codebook, DacNetwork, DecoderBlock, EncoderBlock, ResidualUnit, Snake
from examples.demo_voice.stages import save
from examples.demo_voice.turns import RATE, load_turns, of_training, pcm

CONFIG = CodecConfig(
    encoder_hidden_size=16,
    downsampling_ratios=(2, 4, 4, 10),
    decoder_hidden_size=256,
    hidden_size=64,
    n_codebooks=9,
    codebook_size=256,
    codebook_dim=8,
    sampling_rate=RATE,
)
FRAMES = 32  # of a clip: 0.64 s
WINDOWS = {64: 8, 128: 16, 256: 32, 512: 64, 1024: 80, 2048: 80}  # of spectrograms: samples, and mel bins
FALL = 0.3  # the share of the steps, at the end, in which the learning rate falls to nothing
SAVE = 100  # steps between states that a stopped run goes on from
DECAY = 0.99  # of a codeword's mean, each step
FLOOR = 3e-4  # 70 dB below full scale; what is softer is silence


@dataclass(frozen=True)
class Plan:
    """The plan of a codec's training.

    begin: the step at which codes begin, unless a codec that was taken over has them. rate: the learning rate at its
    peak. samples: weight of the L1 of samples. fewer: share of the clips that do with fewer than all codebooks.
    shortest: of the windows of spectrograms, in samples.
    """

    steps: int = 4000
    begin: int = 300
    batch: int = 8
    rate: float = 6e-4
    samples: float = 15.0
    fewer: float = 0.25
    shortest: int = 64
    seed: int = 1
    device: str = "cpu"


def _snake_forward(x: Tensor, alpha: Tensor) -> Tensor:
    wide, a = x.float(), alpha.float()
    return (wide + torch.sin(a * wide).square() / (a + 1e-9)).to(x.dtype)


def _snake_backward(x: Tensor, alpha: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    wide, a, g = x.float(), alpha.float(), gradient.float()
    sine, cosine = torch.sin(a * wide), torch.cos(a * wide)
    slope = 2 * sine * cosine
    by_alpha = ((wide * slope - sine.square() / a) * g).sum((0, 2, 3), keepdim=True) / a
    return (g * (1 + slope)).to(x.dtype), by_alpha.to(alpha.dtype)


_compiled_forward = torch.compile(_snake_forward, dynamic=True)
_compiled_backward = torch.compile(_snake_backward, dynamic=True)


class _Snake(torch.autograd.Function):
    """`x + sin(a x)^2 / a`, computed in one pass over memory each way, from x alone; several times faster on a CPU.

    On a GPU, which is not what limits there, it would only have to be compiled first.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, alpha: Tensor) -> Tensor:
        context.save_for_backward(x, alpha)
        return _snake_forward(x, alpha) if x.is_cuda else _compiled_forward(x, alpha)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = context.saved_tensors
        run = _snake_backward if x.is_cuda else _compiled_backward
        return run(x, alpha, gradients[0])


def _snake(x: Tensor, snake: Snake) -> Tensor:
    return _Snake.apply(x, snake.alpha[..., None])


def _conv(x: Tensor, layer: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    """The layer on `[batch, channels, 1, samples]` with channels last in memory, which CPUs convolve fastest."""
    weight, bias = layer.weight[:, :, None].to(x.dtype), cast(Tensor, layer.bias).to(x.dtype)
    stride, padding, dilation = (
        (start, end) for start, end in ((1, layer.stride[0]), (0, cast(int, layer.padding[0])), (1, layer.dilation[0]))
    )
    if isinstance(layer, nn.ConvTranspose1d):
        return F.conv_transpose2d(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def _units(x: Tensor, units: Iterable[ResidualUnit]) -> Tensor:
    for unit in units:
        x = x + _conv(_snake(_conv(_snake(x, unit.snake1), unit.conv1), unit.snake2), unit.conv2)
    return x


def encode(network: DacNetwork, wave: Tensor) -> Tensor:
    """`[batch, samples]` -> `[batch, hidden, frames]` float32."""
    x = wave[:, None, None].to(torch.bfloat16).to(memory_format=torch.channels_last)
    x = _conv(x, network.encoder.conv1)
    for block in cast("Iterable[EncoderBlock]", network.encoder.block):
        x = _conv(_snake(_units(x, block.units), block.snake1), block.conv1)
    return _conv(_snake(x, network.encoder.snake1), network.encoder.conv2).squeeze(2).float()


def decode(network: DacNetwork, z: Tensor) -> Tensor:
    """`[batch, hidden, frames]` -> `[batch, samples]` float32."""
    x = z[:, :, None].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x = _conv(x, network.decoder.conv1)
    for block in cast("Iterable[DecoderBlock]", network.decoder.block):
        x = _units(_conv(_snake(x, block.snake1), block.conv_t1), block.units)
    return torch.tanh(_conv(_snake(x, network.decoder.snake1), network.decoder.conv2)[:, 0, 0].float())


class Codebooks:
    """The codewords while they are learnt: running means of the latents that chose them, not steps of an optimizer."""

    def __init__(self, network: DacNetwork, frames: int, generator: torch.Generator) -> None:
        """frames: of each step."""
        self.frames = frames
        self.stages = list(cast("Iterable[Codebook]", network.quantizer.quantizers))
        self.generator = generator
        words = self.stages[0].codebook.weight
        self.counts = words.new_zeros(len(self.stages), words.shape[0])
        self.sums = words.new_zeros(len(self.stages), *words.shape)

    @torch.no_grad()
    def adopt(self) -> None:
        """Go on from the codewords that are there, as if all had been used alike."""
        share = self.frames / self.counts.shape[1]
        self.counts.fill_(share)
        for sums, stage in zip(self.sums, self.stages, strict=True):
            sums.copy_(stage.codebook.weight * share)

    def __call__(self, z: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """`(what codes say of z, how far latents are from codewords)`. used: `[batch]`, codebooks of each clip."""
        left, said, far = z, torch.zeros_like(z), z.new_zeros(())
        for index, stage in enumerate(self.stages):
            latent = stage.in_proj(left).transpose(1, 2)
            with torch.no_grad():
                ids = (F.normalize(latent, dim=-1) @ F.normalize(stage.codebook.weight, dim=-1).T).argmax(-1)
                word = F.embedding(ids, stage.codebook.weight)
                self._learn(index, ids.flatten(), latent.flatten(0, 1))
            on = (index < used).float()
            # Measured against how much latents vary, else they would become less and less varied.
            apart = (latent - word).square().mean((1, 2)) / (latent.var((0, 1)).mean() + 1e-6)
            far = far + (apart * on).mean()
            part = stage.out_proj((latent + (word - latent).detach()).transpose(1, 2))
            said = said + part * on[:, None, None]
            left = left - part
        return said, far

    def _learn(self, index: int, ids: Tensor, latents: Tensor) -> None:
        counts, sums = self.counts[index], self.sums[index]
        counts.mul_(DECAY).index_add_(0, ids, latents.new_full(ids.shape, 1 - DECAY))
        sums.mul_(DECAY).index_add_(0, ids, latents * (1 - DECAY))
        self.stages[index].codebook.weight.copy_(sums / counts.clamp(min=1e-8)[:, None])

    @torch.no_grad()
    def begin(self, z: Tensor) -> None:
        """From latents `[n, hidden]`: each stage looks along the main directions of what those before it left over."""
        left = z
        for index, stage in enumerate(self.stages):
            mean = left.mean(0)
            every_direction = torch.linalg.svd((left - mean).cpu(), full_matrices=False)[2].to(z.device)
            directions = every_direction[: stage.codebook.weight.shape[1]]
            stage.in_proj.weight.copy_(directions[..., None])
            cast(Tensor, stage.in_proj.bias).copy_(-(directions @ mean))
            stage.out_proj.weight.copy_(directions.T[..., None])
            cast(Tensor, stage.out_proj.bias).copy_(mean)
            every = torch.arange(len(stage.codebook.weight), device=z.device)
            self._refill(index, every, (left - mean) @ directions.T)
            left = left - stage.nearest(left.T[None])[1][0].T

    @torch.no_grad()
    def revive(self, z: Tensor) -> None:
        """Put latents of `z`, `[n, hidden]`, where codewords are hardly used."""
        left = z
        for index, stage in enumerate(self.stages):
            rare = (self.counts[index] < 0.03 * self.counts[index].mean()).nonzero()[:, 0]
            self._refill(index, rare, stage.in_proj(left.T[None])[0].T)
            left = left - stage.nearest(left.T[None])[1][0].T

    def _refill(self, index: int, which: Tensor, latents: Tensor) -> None:
        chosen = latents[torch.randint(len(latents), (len(which),), generator=self.generator).to(latents.device)]
        share = self.frames / self.counts.shape[1]  # of what a step brings, if all codewords were used alike
        self.counts[index, which] = share
        self.sums[index, which] = chosen * share
        self.stages[index].codebook.weight[which] = chosen

    def bits(self) -> list[float]:
        """The entropy of the codes of each stage."""
        p = self.counts / self.counts.sum(1, keepdim=True).clamp(min=1e-9)
        return (-p * p.clamp(min=1e-9).log2()).sum(1).tolist()


class Distance:
    """Distance of two waveforms: L1 of mel spectrograms, logarithmic and plain, plus L1 of samples."""

    def __init__(self, plan: Plan) -> None:
        self.samples, self.scales = plan.samples, []
        for n, bins in WINDOWS.items():
            if n >= plan.shortest:
                window = torch.hann_window(n)
                mel = _mel(n, bins) * (2 / window.sum())
                self.scales.append((window.to(plan.device), mel.to(plan.device)))

    def __call__(self, made: Tensor, real: Tensor) -> Tensor:
        total = self.samples * (made - real).abs().mean()
        both = torch.cat([made, real])
        for window, mel in self.scales:
            n = len(window)
            spectrum = torch.stft(both, n, n // 4, window=window, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1) + 1e-9
            a, b = (mel @ power.sqrt() + FLOOR).chunk(2)
            total = total + 3 * (a.log10() - b.log10()).abs().mean() + 20 * (a - b).abs().mean()
        return total


def _mel(n: int, bins: int) -> Tensor:
    """Triangles over `n / 2 + 1` frequencies, each with area 1 (HTK's mel scale)."""
    top = 2595 * math.log10(1 + CONFIG.sampling_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bins + 2) / 2595) - 1)
    hertz = torch.linspace(0, CONFIG.sampling_rate / 2, n // 2 + 1)
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rise, fall).clamp(min=0)
    return triangles / triangles.sum(1, keepdim=True).clamp(min=1e-6)


def stretched(kernel: Tensor, taps: int) -> Tensor:
    """The kernel `[.., taps]` at another stride: its values between the old ones, its sum kept."""
    wide = F.interpolate(kernel.float(), taps, mode="linear", align_corners=False)
    return wide * (kernel.shape[-1] / taps)


@torch.no_grad()
def start_from(network: DacNetwork, other: Path) -> bool:
    """Take over a trained codec of the same widths; strides may differ. Tell whether its codebooks fit as well."""
    theirs, mine = load_codec(other).network.state_dict(), network.state_dict()
    words = "quantizer.quantizers.0.codebook.weight"
    fits = mine[words].shape == theirs[words].shape
    for name, weight in mine.items():
        if fits or not name.startswith("quantizer."):
            found = theirs[name]
            # A transposed convolution adds up `taps / stride` values whatever the stride: nothing to divide there.
            scale = found.shape[-1] / weight.shape[-1] if ".conv_t1." in name and weight.ndim == 3 else 1.0
            weight.copy_(found if found.shape == weight.shape else stretched(found, weight.shape[-1]) / scale)
    return fits


class Run:
    """A training run with all its state: weights, optimizer, codebooks and what is drawn."""

    def __init__(self, plan: Plan, config: CodecConfig, warm_start: Path | None) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.done = plan, 0
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.codec = random_codec(config, plan.seed, plan.device)
        self.network = cast(DacNetwork, self.codec.network).requires_grad_(True).train()
        fits = warm_start is not None and start_from(self.network, warm_start)
        self.begin = 0 if fits else plan.begin
        self.codebooks = Codebooks(self.network, plan.batch * FRAMES, self.generator)
        if fits:
            self.codebooks.adopt()
        self.learnt = [weight for name, weight in self.network.named_parameters() if "codebook" not in name]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=plan.rate, betas=(0.8, 0.99), weight_decay=0.0)
        self.distance, self.recent = Distance(plan), deque[Tensor](maxlen=20)

    def rate(self, step: int) -> float:
        """The learning rate: up, constant, and at last down to nothing."""
        left = (self.plan.steps - step) / (FALL * self.plan.steps)
        return self.plan.rate * min(step / 200, 1.0, 0.01 + left)

    def step(self, sound: Tensor) -> tuple[float, float, float]:
        """Take one; return how far the sound and the latents are off, and the norm of the gradient."""
        plan, codebooks = self.plan, self.codebooks
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.done)
        length = FRAMES * self.codec.hop_length
        starts = torch.randint(len(sound) - length, (plan.batch, 1), generator=self.generator)
        wave = sound[(starts + torch.arange(length)).to(sound.device)].float() / 32768
        z, aside = encode(self.network, wave), wave.new_zeros(())
        self.recent.append(z.detach().transpose(1, 2).flatten(0, 1))
        if self.done == self.begin:
            codebooks.begin(torch.cat(list(self.recent)))
        elif self.done > self.begin and self.done % 50 == 0 and self.done < 0.8 * plan.steps:
            codebooks.revive(self.recent[-1])
        if self.done >= self.begin:
            # Some clips do with fewer codebooks, so that the first ones say what matters most.
            most = round(len(codebooks.stages) / plan.fewer)
            used = torch.randint(1, most, (plan.batch,), generator=self.generator)
            z, aside = codebooks(z, used.to(wave.device))
        far = self.distance(decode(self.network, z), wave)
        self.optimizer.zero_grad()
        (far + 0.25 * aside).backward()
        norm = nn.utils.clip_grad_norm_(self.learnt, 5.0)
        self.optimizer.step()
        return far.item(), aside.item(), float(norm)

    def save(self, path: Path) -> None:
        """Write the state so that a kill while writing leaves the one before."""
        state = {
            "done": self.done,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.codebooks.counts,
            "sums": self.codebooks.sums,
            "generator": self.generator.get_state(),
            "recent": list(self.recent),
        }
        save(state, path)

    def restore(self, path: Path) -> None:
        """Go on from a state."""
        state = torch.load(path, map_location=self.plan.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebooks.counts.copy_(state["counts"])
        self.codebooks.sums.copy_(state["sums"])
        self.generator.set_state(state["generator"].cpu())
        self.recent.extend(state.get("recent", ()))
        self.done = state["done"]


def train(
    sound: Tensor, output: Path, plan: Plan, config: CodecConfig = CONFIG, warm_start: Path | None = None
) -> Codec:
    """Train, or go on, and write the codec in the layout of transformers at the end.

    sound: int16 samples at the codec's rate, all recordings in a row. The state lies beside the codec, in
    `OUTPUT.state`; the log, of every 20th step, in `OUTPUT.log`.
    """
    run, state = Run(plan, config, warm_start), output.with_name(f"{output.name}.state")
    output.parent.mkdir(parents=True, exist_ok=True)
    if state.is_file():
        run.restore(state)
    sound, started = sound.to(plan.device), time.monotonic()
    with output.with_name(f"{output.name}.log").open("a") as log:
        for _ in tqdm(range(plan.steps - run.done), unit="step", dynamic_ncols=True, mininterval=30):
            losses = run.step(sound)
            if run.done % 20 == 0:
                numbers = [run.done, *losses, run.rate(run.done), time.monotonic() - started, *run.codebooks.bits()]
                log.write(" ".join(f"{number:.4g}" for number in numbers) + "\n")
                log.flush()
            if run.done % SAVE == 0 or run.done == plan.steps:
                run.save(state)
    run.codec.save_pretrained(output)
    return run.codec


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("speech", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("--warm-start", type=Path)
    for field in fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    turns = [turn for turn in load_turns(options.pop("speech")) if of_training(turn)]
    output, warm_start = options.pop("codec"), options.pop("warm_start")
    train(pcm(turns), output, Plan(**options), warm_start=warm_start)


if __name__ == "__main__":
    main()
