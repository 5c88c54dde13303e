"""Calls of the public functions with hostile arguments: they work, or say what is wrong by an error of dia_fast."""

import asyncio
import inspect
import random
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_fast import Audio, Dia, DiaConfig, SamplingParams
from dia_fast.audio.codec import CodecConfig, load_codec, random_codec
from dia_fast.checkpoint.saving import convert
from dia_fast.engine import Request
from dia_fast.errors import DiaFastError
from dia_fast.generation.sampling_params import SamplingOptions
from dia_fast.model.config import DecoderConfig, EncoderConfig
from dia_fast.text.segmentation import split_script
from dia_fast.text.tokenizer import encode_text, join_prompt, text_warnings
from tests.helpers.codecs import SMALL
from tests.helpers.front import make_dia

CALLS = 5000


class Raising:
    """Its every conversion fails, as that of a broken object of the caller does."""

    def __repr__(self) -> str:
        return "Raising()"


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 45, 1 << 31, 1 << 63, -(1 << 64), 10**400, 10**5000, 0.0, -0.0, 0.5, 1.0, 1e308,
    float("nan"), float("inf"), -float("inf"), 1j, Fraction(1, 3), "", " ", "x", "[S1]", "[S1] Hi.", "[S2] a [S1] b",
    "\0", "\x01", "\ud800", "a" * 300, "a" * 9000, "~nosuchuser", "/proc/self/mem", "/dev/null", ".", "4GB", "-1GB",
    "auto", "cpu", "cuda:99", "meta", "mps", "triton", "torch", "float32", "float99", b"", b"[S1] Hi.", b"\xff",
    bytearray(b"x"), [], [""], ["[S1] Hi."], ["[S1] Hi.", None], [1, 2], [[]], [None], (), (1,), (1, 2), {}, {"a": 1},
    set(), object(), Raising(), int, len, range(3), Path("/nowhere"), Path("a" * 300), np.float64(0.5), np.int64(3),
    np.array([]), np.zeros(8000, np.float32), np.full(10, np.nan), np.array(["a"]), np.array([None]), np.zeros((2, 9)),
    np.zeros((2, 9), np.int64), (np.zeros(4000, np.float32), 8000), (np.zeros(4000), "x"), (None, None),
    torch.zeros(0), torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.int64), torch.full((3, 9), -1), torch.tensor(3),
    torch.zeros(1, 2, 9, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 9, device="meta"),
    torch.ones(3).to_sparse(), torch.zeros(2, 9, dtype=torch.bool), torch.zeros(4000), torch.float32, torch.int8,
    torch.device("cpu"), "descript:/nowhere", "demo", "nobody/nothing",
)  # fmt: skip


def _targets(dia: Dia) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions, and arguments that keep them from computing or downloading for long where nothing hostile is given."""
    spoken = {"text": "[S1] Hi.", "max_new_tokens": 17}
    codec = random_codec(SMALL)
    audio = Audio(np.zeros(4000, np.float32), 8000)
    return [
        (dia.generate, spoken),
        (dia.generate_codes, spoken),
        (lambda **given: list(dia.stream(**given)), spoken),
        (lambda **given: asyncio.run(_all(dia, given)), spoken),
        (dia.forward_logits, {"text": "[S1] Hi.", "delayed_codes": torch.full((1, 2, 9), 3)}),
        (Dia.from_pretrained, {"name_or_path": "/nowhere", "local_files_only": True}),
        (load_codec, {"name_or_path": "/nowhere", "local_files_only": True}),
        (convert, {"source": "/nowhere", "destination": "/proc/nowhere"}),
        (Request, {"text_ids": [1, 65]}),
        (lambda **given: dia.engine.submit(Request(**given)).cancel(), {"text_ids": [1, 65], "max_new_tokens": 17}),
        (SamplingParams, {}),
        (Audio, {"samples": np.zeros(10, np.float32), "sample_rate": 8000}),
        (audio.resampled, {"sample_rate": 8000}),
        (audio.to_bytes, {}),
        (codec.encode, {"samples": np.zeros(100, np.float32)}),
        (codec.decode, {"codes": torch.zeros(3, 3, dtype=torch.int64)}),
        (codec.decode_span, {"codes": torch.zeros(3, 3, dtype=torch.int64), "start": 0, "stop": 1}),
        (CodecConfig, {}),
        (CodecConfig.from_transformers, {"data": {}}),
        (CodecConfig.from_official, {"kwargs": {}}),
        (DiaConfig, {}),
        (DiaConfig.from_dict, {"data": {"model_type": "dia"}}),
        (DiaConfig.from_file, {"path": "/nowhere"}),
        (EncoderConfig, {}),
        (DecoderConfig, {}),
        (encode_text, {"text": "[S1] Hi."}),
        (text_warnings, {"text": "[S1] Hi."}),
        (join_prompt, {"prompt_text": "[S1] a", "text": "b"}),
        (split_script, {"text": "[S1] Hi."}),
    ]


async def _all(dia: Dia, given: dict[str, Any]) -> list[Audio]:
    return [chunk async for chunk in dia.astream(**given)]


def _parameters(dia: Dia, number: int, function: Callable[..., Any]) -> list[str]:
    told = {2: dia.stream, 3: dia.astream, 9: Request}.get(number, function)
    names = [name for name in inspect.signature(told).parameters if name not in ("progress", "fade_seconds")]
    return [*names[:-1], *SamplingOptions.__annotations__] if names[-1] == "options" else names


def test_hostile_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failures: dict[str, str] = {}
    with make_dia(tmp_path / "dia") as dia, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = _targets(dia)
        names = [_parameters(dia, number, function) for number, (function, _) in enumerate(targets)]
        for seed in range(CALLS):
            rng = random.Random(seed)
            number = seed % len(targets)
            function, usual = targets[number]
            chosen = rng.sample(names[number], min(len(names[number]), rng.choice((1, 1, 2))))
            given = usual | {name: rng.choice(VALUES) for name in chosen}
            try:
                function(**given)
            except DiaFastError:
                pass
            except Exception as error:
                trace = error.__traceback__
                while trace.tb_next:
                    trace = trace.tb_next
                where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
                key = f"{getattr(function, '__qualname__', function)} {type(error).__name__} {where}"
                said = {name: f"{type(given[name]).__name__}" for name in chosen}
                failures.setdefault(key, f"seed {seed}: {said}: {str(error)[:100]}")
    assert not failures, "\n".join(f"{key}: {value}" for key, value in failures.items())
