"""A result depends on arguments alone: every door under every setting that a caller may have made in torch."""

import ast
import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dia_fast
import dia_kernels
from dia_fast import Dia
from dia_fast.audio.codec import CodecConfig, random_codec
from dia_fast.audio.codec.load import load_codec
from dia_fast.checkpoint.saving import convert
from dia_fast.engine import Engine, Request
from dia_fast.training import Example, batch_loss, build_batch
from dia_fast.utils.ambient import isolated
from tests.helpers.front import TEXT, TINY, make_codec, make_model

SHORT: dict[str, Any] = {"max_new_tokens": 40, "seed": 3, "temperature": 1.0}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        end = time.monotonic() + 10  # a thread of the door may be in its last product
        while torch.get_float32_matmul_precision() != name:
            assert time.monotonic() < end
            time.sleep(1e-3)
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "precision": lambda: precision("medium"),
    "deterministic": deterministic,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = make_model(tmp_path_factory.mktemp("ambient") / "model")
    make_codec(folder / "codec")
    return folder


def load(folder: Path, dtype: str = "float32") -> Dia:
    return Dia.from_pretrained(folder, device="cpu", dtype=dtype)


def sound(folder: Path) -> list[Any]:
    with load(folder) as dia:
        return [dia.generate(TEXT, audio_prompt=torch.ones((9, 9), dtype=torch.int64, device="cpu"), **SHORT).samples]


def narrow(folder: Path) -> list[Any]:
    with load(folder, "bfloat16") as dia:
        return dia.generate_codes([TEXT, "[S1] Yes."], **SHORT)


def stream(folder: Path) -> list[Any]:
    with load(folder) as dia:
        return [chunk.samples for chunk in dia.stream(TEXT, **SHORT)]


def astream(folder: Path) -> list[Any]:
    async def chunks(dia: Dia) -> list[Any]:
        return [chunk.samples async for chunk in dia.astream(TEXT, **SHORT)]

    with load(folder) as dia:
        return asyncio.run(chunks(dia))


def engine(folder: Path) -> list[Any]:
    with Engine(load(folder).model, max_batch=2) as engine:
        handles = [engine.submit(Request([65, 66, 67], max_new_tokens=30, seed=i), stream=True) for i in range(3)]
        chunks = [part for handle in handles for part in handle.frames()]
        return [*chunks, *(handle.result().delayed_codes for handle in handles)]


def logits(folder: Path) -> list[Any]:
    rows = torch.arange(90, dtype=torch.int64, device="cpu").view(1, 10, 9)
    return list(load(folder).forward_logits(TEXT, rows))


def codec(folder: Path) -> list[Any]:
    samples = np.sin(np.arange(5000, dtype=np.float32) / 9)
    parts: list[Any] = []
    for each in (load_codec(folder / "codec"), random_codec(CodecConfig(encoder_hidden_size=4))):
        codes = each.encode(samples)
        parts += [codes, each.decode(codes)]
    return parts


def original(folder: Path) -> list[Any]:
    from dia_fast.integrations.original.model import Dia as Original

    dia = Original.from_local(
        str(folder / "config.json"), str(folder / "model.safetensors"), device=torch.device("cpu"), load_dac=False
    )
    return [dia.generate(TEXT, max_tokens=40, seed=3)]


def accelerated(folder: Path) -> list[Any]:
    from dia_fast.integrations.transformers import accelerate
    from tests.integrations.models import greedy, inputs, make_model

    # Built and prepared by transformers, whose own result may well depend on what is set: only the call is ours.
    torch.manual_seed(1)
    with _plain():
        model, given = accelerate(make_model()), inputs()
    return [model.generate(**given, **greedy(max_new_tokens=18))]


def loss(folder: Path) -> list[Any]:
    codes = torch.arange(90, dtype=torch.int64, device="cpu").view(10, 9)
    batch = build_batch([Example([65, 66], codes), Example([67], codes[:4])], TINY)
    result = batch_loss(load(folder).model, batch)
    return [result.mean, result.sums]


def converted(folder: Path) -> list[Any]:
    target = folder.parent / f"converted-{len(list(folder.parent.iterdir()))}"
    convert(folder, target, dtype=torch.bfloat16)
    return [np.frombuffer((target / "model.safetensors").read_bytes(), np.uint8)]


DOORS = [sound, narrow, stream, astream, engine, logits, codec, original, accelerated, loss, converted]


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Everything as torch starts, for what prepares a call."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with isolated(), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[Callable[[Path], list[Any]]], list[np.ndarray]]:
    known: dict[str, list[np.ndarray]] = {}

    def of(door: Callable[[Path], list[Any]]) -> list[np.ndarray]:
        if door.__name__ not in known:
            known[door.__name__] = arrays(door(folder))
        return known[door.__name__]

    return of


def arrays(parts: list[Any]) -> list[np.ndarray]:
    return [part.detach().numpy() if isinstance(part, Tensor) else part for part in parts]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_result_depends_on_arguments_alone(folder: Path, expected: Any, door: Any, state: str) -> None:
    wanted = expected(door)
    with STATES[state]():
        parts = door(folder)
    assert len(parts) == len(wanted)
    if door is not loss:
        assert not any(isinstance(part, Tensor) and part.is_inference() for part in parts)
    for part, want in zip(arrays(parts), wanted, strict=True):
        assert part.dtype == want.dtype
        np.testing.assert_array_equal(part, want)


@pytest.mark.parametrize("state", STATES)
def test_a_first_use_under_a_state_leaves_nothing_behind(folder: Path, expected: Any, state: str) -> None:
    with STATES[state]():
        dia = load(folder, "bfloat16")
        dia.generate_codes("[S1] First.", max_new_tokens=18)
    for part, want in zip(dia.generate_codes([TEXT, "[S1] Yes."], **SHORT), expected(narrow), strict=True):
        np.testing.assert_array_equal(part.numpy(), want)


ALLOCATE = set("empty zeros ones full arange tensor linspace rand randn randint randperm eye scalar_tensor".split())


@pytest.mark.parametrize("package", [dia_fast, dia_kernels], ids=lambda package: package.__name__)
def test_every_allocation_names_dtype_and_device(package: Any) -> None:
    unnamed = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(Path(package.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in ALLOCATE
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]
    assert not unnamed


@pytest.mark.parametrize("newer", [False, True])
def test_the_codecs_float32_is_never_tf32(newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the caller's choice for his own convolutions lost. newer: he has used the switch of torch 2.9."""
    backend, seen = torch.backends.cudnn, []
    if newer and not hasattr(backend, "conv"):
        pytest.skip("this torch has no such switch")

    def allowed() -> bool:
        return bool(backend.conv.fp32_precision == "tf32" if newer else backend.allow_tf32)

    codec = random_codec(CodecConfig(encoder_hidden_size=4, decoder_hidden_size=32))
    real = torch.nn.functional.conv1d

    def conv1d(*inputs: Any, **named: Any) -> Tensor:
        seen.append(allowed())
        return real(*inputs, **named)

    monkeypatch.setattr(torch.nn.functional, "conv1d", conv1d)
    before = backend.allow_tf32
    try:
        for choice in (True, False):
            if newer:
                backend.conv.fp32_precision = "tf32" if choice else "ieee"
            else:
                backend.allow_tf32 = choice
            codes = codec.encode(torch.zeros(2_000))
            codec.decode(codes)
            codec.stream().decode_span(codes, 0, len(codes))
            until = time.monotonic() + 20  # the codec's thread may still be on its way out
            while allowed() is not choice:
                assert time.monotonic() < until
        assert len(seen) > 20 and not any(seen)
    finally:
        backend.allow_tf32 = before
