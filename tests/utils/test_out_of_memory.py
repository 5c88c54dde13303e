"""Memory that runs out: one error that says what helps, at every door, and whatever else runs goes on."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from dia_fast import Dia, OutOfMemory
from dia_fast.audio.codec.incremental import IncrementalDecoder
from dia_fast.cli import main
from dia_fast.engine import Engine, Request, StepFailed
from dia_fast.server.errors import as_api_error
from dia_fast.training import Example, batch_loss, build_batch, forward
from dia_fast.utils.out_of_memory import out_of_memory
from tests.helpers.front import TEXT, TINY, make_codec, make_dia, make_model

SHORT: dict[str, Any] = {"max_new_tokens": 40, "seed": 3}
ERRORS: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 9 GB"),
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines"),
    "native": lambda: RuntimeError("std::bad_alloc"),
}
STEP, PREFILL = "rope_attention", "ragged_attention"


def failing(make: Callable[[], Exception]) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise make()

    return fail


async def _all(dia: Dia) -> list[Any]:
    return [chunk async for chunk in dia.astream(TEXT, **SHORT)]


def training(dia: Dia) -> object:
    codes = torch.arange(90).view(10, 9)
    return batch_loss(dia.model, build_batch([Example([65, 66], codes)], TINY))


VOICE = torch.ones((9, 9), dtype=torch.int64)
# What a caller does, and what runs out of memory while it is done: an op, or a method of the codec's network.
DOORS: dict[str, tuple[Callable[[Dia], object], str]] = {
    "generate": (lambda dia: dia.generate(TEXT, **SHORT), STEP),
    "prefill": (lambda dia: dia.generate(TEXT, audio_prompt=VOICE, **SHORT), PREFILL),
    "codes of a list": (lambda dia: dia.generate_codes([TEXT, TEXT], **SHORT), STEP),
    "stream": (lambda dia: list(dia.stream(TEXT, **SHORT)), STEP),
    "stream of sound": (lambda dia: list(dia.stream(TEXT, **SHORT)), "step"),
    "astream": (lambda dia: asyncio.run(_all(dia)), STEP),
    "sound": (lambda dia: dia.generate(TEXT, **SHORT), "decode"),
    "prompt": (lambda dia: dia.generate(TEXT, audio_prompt=(np.ones(44_100, np.float32), 44_100), **SHORT), "encode"),
    "codec": (lambda dia: dia.codec.decode(VOICE), "decode"),
    "logits": (lambda dia: dia.forward_logits(TEXT, VOICE[None]), PREFILL),
    "training": (training, "linear_cross_entropy"),
    "engine": (lambda dia: Engine(dia.model, max_batch=1), "zeros"),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_tells(door: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, place = DOORS[door]
    dia = make_dia(tmp_path)
    dia.codec  # noqa: B018
    owners: dict[str, Any] = {"decode": dia.codec.network, "encode": dia.codec.network, "zeros": torch}
    owners |= {"linear_cross_entropy": forward, "step": IncrementalDecoder}
    owner = owners.get(place, dia.model.ops)
    with monkeypatch.context() as patched:
        patched.setattr(owner, place, failing(ERRORS[kind]))
        with pytest.raises(OutOfMemory, match=r"no memory left.*fewer or shorter texts at once") as caught:
            call(dia)
    told = str(caught.value)
    assert told.startswith("the GPU has" if kind == "gpu" else "the machine has") and "\n" not in told
    assert isinstance(caught.value, MemoryError)
    call(dia)  # and afterwards all is well
    assert dia.engine.stats.running == 0 and dia.engine.stats.pages == 0


def test_only_the_one_that_has_no_room_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dia = make_dia(tmp_path)
    alone = dia.generate_codes(TEXT, **SHORT)[0]
    with Engine(dia.model, max_batch=2) as engine:
        good = engine.submit(Request([*TEXT.replace("[S1]", "\1").replace("[S2]", "\2").encode()], **SHORT))
        engine.step()
        with monkeypatch.context() as patched:
            patched.setattr(type(dia.model), "store_text", failing(MemoryError))
            bad = engine.submit(Request([1, 65], **SHORT))
            engine.step()
        assert isinstance(bad.error, OutOfMemory)
        assert torch.equal(good.result().frames, alone)


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert out_of_memory(RuntimeError("shapes do not match")) is None
    assert out_of_memory(ValueError("not enough memory")) is None
    dia = make_dia(tmp_path)
    monkeypatch.setattr(dia.model.ops, STEP, failing(lambda: RuntimeError("shapes do not match")))
    with pytest.raises(StepFailed, match="shapes do not match"):
        dia.generate_codes(TEXT, **SHORT)


@pytest.mark.parametrize("command", ["speak", "stream", "batch"])
def test_commands_say_it_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from dia_kernels import reference

    torch.manual_seed(1)
    model, codec = make_model(tmp_path / "model"), make_codec(tmp_path / "codec")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    monkeypatch.setattr(reference, STEP, failing(ERRORS["cpu"]))
    words = {
        "speak": ["speak", TEXT, "-o", str(tmp_path / "out.wav")],
        "stream": ["speak", TEXT, "--stream", "-o", str(tmp_path / "out.wav")],
        "batch": ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out")],
    }[command]
    assert main([*words, "--model", str(model), "--codec", str(codec), "--device", "cpu", "-q"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1 and "the machine has no memory left" in lines[0]
    assert not (tmp_path / "out.wav").exists()


def test_a_server_says_that_another_time_may_do() -> None:
    told = as_api_error(OutOfMemory("the GPU has no memory left"))
    assert (told.status, told.code) == (503, "out_of_memory") and "Retry-After" in told.headers
