"""Does this machine run the kernels, and do they compute what they should?

Where Triton can run, a model of Dia's width with random weights speaks a few rows on an op set that runs every call
twice, as a kernel and as its torch reference, and compares. Elsewhere the kernels are compiled for common GPUs, and
what could not be checked is said.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dia_fast.audio.codec import load_codec
from dia_fast.checkpoint.loading import Checkpoint
from dia_fast.engine import Generation, Request, generate
from dia_fast.errors import NumericError
from dia_fast.model import cpu_weights
from dia_fast.model.config import DiaConfig
from dia_fast.model.device import choose_ops
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, INT8, rounded
from dia_kernels import reference
from dia_kernels.ops import triton_obstacle
from dia_kernels.reference import PackedWeight, packed
from dia_kernels.reference.quantized import Int8Weight

_NO_KERNELS = ("philox", "sample_weights", "attention_workspace", "PackedWeight")
STEPS = 86  # of a check of a model: a second
OPS = tuple(op for op in reference.__all__ if op not in _NO_KERNELS)
PROJECTIONS = ("rms_norm_linear", "linear_residual", "rms_norm_glu", "codebook_logits")
IN_8_BITS = " x int8"  # behind the name of an op: by weights in 8 bits


@dataclass(frozen=True)
class Verdict:
    """The finding about one op.

    outcome: "ok", "wrong" (ran, other numbers), "failed" (raised), "compiled" (not run) or "unchecked"; share: largest
    error as a share of what is allowed, 0 where nothing ran.
    """

    op: str
    outcome: str
    detail: str
    share: float = 0.0

    @property
    def healthy(self) -> bool:
        return self.outcome not in ("wrong", "failed")


class ComparingOps:
    """An op set that runs `kernels` and the torch reference side by side, notes how they differ, and goes on.

    Allowed for half-precision results: twice the error of the reference itself against fp32, plus one rounding. For
    fp32 results: 1e-5 of the largest, some hundred ulps, which a sum of 8,192 products in another order stays below.
    Integers have to be equal. By weights in 8 bits kernels round the activations once, as the reference does here.
    """

    name = "comparing"

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.calls: dict[str, int] = {}
        self.shares: dict[str, float] = {}
        self.errors: dict[str, str] = {}

    def attention_workspace(self, *args: Any) -> Any:
        return self.kernels.attention_workspace(*args)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in OPS:
            raise AttributeError(op)
        return lambda *args, **named: self._both(op, args, named)

    def _both(self, op: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self.calls[op] = self.calls.get(op, 0) + 1
        plain = [_copied(value, args[0].dtype) for value in args], {k: _copied(v) for k, v in named.items()}
        exact = [_widened(value) for value in args], {k: _widened(v) for k, v in named.items()}
        getattr(reference, op)(*plain[0], **plain[1])
        getattr(reference, op)(*exact[0], **exact[1])
        try:
            result = getattr(self.kernels, op)(*args, **named)
            if args[0].device.type == "cuda":
                torch.cuda.synchronize(args[0].device)
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            self.errors.setdefault(op, f"{type(error).__name__}: {first}")
            return getattr(reference, op)(*args, **named)
        given = ((*values, *others.values()) for values, others in ((args, named), plain, exact))
        for got, low, wide in zip(*given, strict=True):
            if isinstance(got, Tensor) and not isinstance(got, nn.Parameter):
                self.shares[op] = max(self.shares.get(op, 0.0), _share(got, low, wide))
        return result

    def verdicts(self) -> Iterator[Verdict]:
        """One for every op."""
        for op in OPS:
            share = self.shares.get(op, 0.0)
            if op in self.errors:
                yield Verdict(op, "failed", self.errors[op])
            elif op not in self.calls:
                yield Verdict(op, "unchecked", "was not called")
            elif not share <= 1:
                yield Verdict(op, "wrong", f"error {share:.3g} times what is allowed, in {self.calls[op]} calls", share)
            else:
                yield Verdict(op, "ok", f"error at most {share:.2f} of what is allowed, {self.calls[op]} calls", share)


class _Rounding(PackedWeight):
    """A matrix in 8 bits that is multiplied by activations rounded to a dtype."""

    def __init__(self, weight: Int8Weight, dtype: torch.dtype) -> None:
        self.weight, self.dtype, self.shape = weight, dtype, weight.shape

    def linear(self, x: Tensor) -> Tensor:
        return self.weight.linear(x.to(self.dtype))


def _copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of what an op may write to; weights, which none does, are not. dtype: of the activations."""
    if isinstance(value, Int8Weight) and dtype is not None:
        return _Rounding(value, dtype)
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def _widened(value: Any) -> Any:
    """A copy in float32 of what has fewer bits, weights too."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else _copied(value)


def _share(got: Tensor, low: Tensor, exact: Tensor) -> float:
    """Largest error of `got` over what it may be; infinite where it is not even finite, or integers differ."""
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, low) else float("inf")
    if not torch.equal(got.isfinite(), low.isfinite()):
        return float("inf")
    rounding = torch.finfo(got.dtype).eps / 2
    finite = low.isfinite()
    got, low, exact = got[finite].double(), low[finite].double(), exact[finite].double()
    if not got.numel() or torch.equal(got, low):
        return 0.0
    error, plain, largest = ((a - b).abs().max().item() for a, b in ((got, exact), (low, exact), (exact, 0 * exact)))
    return error / (2 * plain + max(rounding, 1e-5 if plain == 0 else 0.0) * largest)


def random_model(
    config: DiaConfig, ops: Any, dtype: torch.dtype, device: torch.device, weights: str = FLOAT
) -> DiaModel:
    """Random weights of the size that training gives them: unit norms, matrices that keep the scale.

    weights: of `quantization.WEIGHTS`.
    """
    generator = torch.Generator(device).manual_seed(0)
    fused = {}
    for name, shape in fused_shapes(config).items():
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        fused[name] = (1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5).to(dtype)
    return DiaModel(config, cast(ModuleType, ops)).load(rounded(fused, config, weights))


def check_running(kernels: Any, dtype: torch.dtype, device: torch.device, *, full_width: bool) -> list[Verdict]:
    """Speak a few rows on both op sets; at the width of Dia-1.6B, or with small tensors for an interpreter.

    Projections are checked twice, the second time by weights in 8 bits.
    """
    ops, narrow = ComparingOps(kernels), ComparingOps(kernels)
    config = DiaConfig()
    frames, rows = 300, 40
    if full_width:
        config = replace(
            config,
            encoder=replace(config.encoder, num_hidden_layers=1),
            decoder=replace(config.decoder, num_hidden_layers=1),
        )
    else:
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        cross = {"cross_num_attention_heads": 2, "cross_num_key_value_heads": 2, "cross_head_dim": 16}
        codes = {"num_channels": 2, "vocab_size": 40, "eos_token_id": 36, "pad_token_id": 37, "bos_token_id": 38}
        config = DiaConfig(
            encoder=replace(config.encoder, **small, **heads),
            decoder=replace(config.decoder, **small, **heads, **cross, **codes, cross_hidden_size=32),
            delay_pattern=(0, 1),
        )
        frames, rows = 3, 3
    with suppress(NumericError):  # of an op that leaves no numbers, which its verdict tells
        _speak(random_model(config, ops, dtype, device), frames, rows)
    with suppress(NumericError):
        _speak(random_model(config, narrow, dtype, device, INT8), 0, min(rows, 3))
    x = torch.linspace(-9, 9, 3000 if full_width else 40, device=device, dtype=torch.float32).to(dtype).view(1, 2, -1)
    alpha = torch.ones(2, dtype=dtype, device=device)
    ops.snake(x, alpha, torch.empty_like(x))
    ops.snake_residual(x, x, alpha, torch.empty_like(x), torch.empty_like(x))
    projections = [verdict for verdict in narrow.verdicts() if verdict.op in PROJECTIONS]
    return [*ops.verdicts(), *(replace(verdict, op=verdict.op + IN_8_BITS) for verdict in projections)]


def _speak(model: DiaModel, frames: int, steps: int) -> Generation:
    prompt = torch.zeros(frames, model.config.decoder.num_channels, dtype=torch.int32, device="cpu")
    request = Request(
        list(b"\x01 Are these kernels sound?"), prompt=prompt if frames else None, max_new_tokens=steps, seed=1
    )
    [generation] = generate(model, [request])
    return generation


def check_model(checkpoint: Checkpoint, codec: str, dtype: torch.dtype, device: torch.device, offline: bool) -> Verdict:
    """Load a checkpoint and its codec, speak a second and decode it; with kernels on a GPU, compare each call.

    Args:
        checkpoint: Opened. Its weights are read and checked here.
        codec: Name or path.
        dtype: Of the computation.
        device: Where it computes.
        offline: Download nothing.

    Raises:
        CheckpointError: The weights or the codec cannot be used.
    """
    ops = choose_ops("auto", device)
    compared = ComparingOps(ops) if ops is not reference else None
    model = DiaModel(checkpoint.config, cast(ModuleType, compared or ops)).load(checkpoint.load(dtype, device))
    voice = load_codec(codec, device=device, ops=ops, local_files_only=offline)
    try:
        frames = _speak(model, 0, STEPS).frames
        if len(frames):
            voice.decode(frames)
    except NumericError as error:
        return Verdict("model", "failed", str(error))
    worst = max(compared.verdicts(), key=lambda verdict: (not verdict.healthy, verdict.share)) if compared else None
    if worst is not None and not worst.healthy:
        return Verdict("model", worst.outcome, f"{worst.op}: {worst.detail}", worst.share)
    told = f"every weight and every number of {STEPS} steps is finite; {len(frames)} frames decoded"
    if worst is not None:
        told += f"; error at most {worst.share:.2f} of what is allowed"
    return Verdict("model", "ok", told, worst.share if worst is not None else 0.0)


def check_compiling(targets: Sequence[str], dtype: torch.dtype) -> list[Verdict]:
    """Compile every kernel at the shapes of Dia-1.6B for GPUs that need not be here. Needs Triton, uninterpreted."""
    from dia_fast.diagnostics import launches
    from dia_kernels import aot as ahead
    from dia_kernels import triton as kernels

    failures: dict[str, str] = {}
    for target in targets:
        for op in OPS:
            ops = SimpleNamespace(**{name: getattr(kernels, name) for name in kernels.__all__})
            for other in OPS:
                if other != op:
                    setattr(ops, other, lambda *args, **named: None)
            try:
                with ahead.compiling(target):
                    launches.decode(2, dtype, ops)
                    launches.decode(2, dtype, ops, launches.one_layer(dtype, ops, weights=INT8))
                    first_generation = DiaConfig(first_generation=True)
                    launches.decode(2, dtype, ops, launches.one_layer(dtype, ops, first_generation))
                    launches.prefill(dtype, ops)
            except Exception as error:
                failures.setdefault(op, f"for {target}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return [
        Verdict(op, "failed", failures[op]) if op in failures else Verdict(op, "compiled", f"for {', '.join(targets)}")
        for op in OPS
    ]


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for a report."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("dia-fast", "torch", "triton", "transformers"):
        try:
            # torch itself also names its build (+cpu, +cu130), which its package's version may leave out.
            facts[package] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        facts["device"] = f"{device} (torch sees {torch.cuda.device_count()} GPUs)"
    return facts


def cpu_product(dtype: torch.dtype) -> str:
    """The product that multiplies the matrices of a model in `dtype` on this processor, why, and the others."""
    chosen, why = cpu_weights.choose(dtype)
    others = [name for name in packed.PRODUCTS if name != chosen and packed.runs_here(name)]
    return f"{chosen}: {why}" + (f"; {cpu_weights.VARIABLE} can ask for {', '.join(others)}" if others else "")


def backend_choice(device: torch.device) -> tuple[str, str]:
    """The backend that `backend="auto"` takes on `device`, and why."""
    obstacle = triton_obstacle(device)
    if device.type == "cpu":
        return "torch", "a CPU runs the torch ops" + (f"; Triton cannot run here: {obstacle}" if obstacle else "")
    return ("torch", obstacle) if obstacle else ("triton", "Triton has a driver for this device")
