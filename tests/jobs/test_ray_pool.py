"""The items of each actor, and those whose actor was lost: with a stand-in for Ray."""

import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_fast.cli import main
from dia_fast.errors import CheckpointError, InputError
from dia_fast.generation.outcome import Outcome
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.jobs.items import Item
from dia_fast.jobs.ray_pool import MOST_LOSSES, PoolOptions, _cause, _Pool
from dia_fast.jobs.runner import Spoken
from dia_fast.utils.ray import check_address


def an_item(name: str, prompt: Path | None = None) -> Item:
    params = SamplingParams(seed=1)
    return Item(1, name, "[S1] Hi.", prompt, None, "d" * 8 if prompt else "", False, params, f"{name}.wav", {}, "")


class LostError(Exception):
    pass


class Method:
    def __init__(self, call: Any) -> None:
        self._call = call

    def options(self, **_: Any) -> "Method":
        return self

    def remote(self, *values: Any) -> Any:
        return self._call(*values)


class Actor:
    """Speaks items in any order, and is lost with a chance, or by one of `deadly` at once."""

    def __init__(self, ray: "StandIn") -> None:
        self.ray = ray
        self.ready = Method(self._ready)
        self.speak = Method(self._speak)

    def _ready(self) -> object:
        self.ray.made += 1
        return LostError(self.ray.why) if self.ray.made in self.ray.unable else object()

    def _speak(self, items: list[Item], prompts: dict[str, Any]) -> Iterator[Spoken | int]:
        self.ray.groups.append([item.id for item in items])
        return self._spoken(items, prompts)

    def _spoken(self, items: list[Item], prompts: dict[str, Any]) -> Iterator[Spoken | int]:
        items = self.ray.random.sample(items, len(items))
        for item in items:
            self.ray.begun.append(item.id)
            if item.prompt is not None:
                assert prompts[item.prompt_digest] == item.prompt.read_bytes()
            if item.id in self.ray.deadly or self.ray.random.random() < self.ray.loss:
                raise LostError("The actor died.\nIts process was killed.")
            yield 3
            yield Spoken(item.id, np.zeros(10, np.float32), 10, Outcome(()))


class StandIn:
    """As much of Ray as the pool uses."""

    exceptions = SimpleNamespace(RayActorError=LostError, ActorDiedError=LostError)

    def __init__(self, cpus: float, seed: int = 0, loss: float = 0.0, deadly: frozenset[str] = frozenset()) -> None:
        self.random, self.loss, self.deadly, self.cpus = random.Random(seed), loss, deadly, cpus
        self.made, self.unable = 0, frozenset[int]()  # which actors cannot start, from 1
        self.why = "no memory"
        self.begun: list[str] = []
        self.groups: list[list[str]] = []
        self.killed: list[Actor] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, _: type) -> Method:
        return Method(lambda _load: Actor(self))

    def wait(self, waiting: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return [self.random.choice(waiting)], []

    def get(self, value: Any) -> Any:
        if isinstance(value, LostError):
            raise value
        return value

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: Actor, no_restart: bool) -> None:
        self.killed.append(actor)


def spoken_by(ray: StandIn, items: list[Item], **options: Any) -> tuple[list[Spoken], _Pool, list[str]]:
    told: list[str] = []
    pool = _Pool(ray, items, lambda: None, PoolOptions("local", **options), told.append)  # type: ignore[arg-type, return-value]
    found = list(pool.results())
    pool.close()
    return found, pool, told


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.4]))
def test_every_item_is_told_once_whatever_is_lost(count: int, cpus: int, seed: int, loss: float) -> None:
    items = [an_item(f"i{number}") for number in range(count)]
    if not items:
        return
    ray = StandIn(cpus, seed, loss)
    found, pool, told = spoken_by(ray, items)
    assert sorted(spoken.id for spoken in found) == sorted(item.id for item in items)
    assert sum(report.items for report in pool.reports.values()) == sum(spoken.outcome is not None for spoken in found)
    assert len(ray.killed) == min(cpus, count) and bool(told) == bool(pool.losses)
    assert all(pool.losses[spoken.id] >= MOST_LOSSES for spoken in found if spoken.outcome is None)


def test_an_actor_that_cannot_start_again_is_done_without() -> None:
    items = [an_item(f"i{number}") for number in range(30)]
    ray = StandIn(2, seed=3, loss=0.3)
    ray.unable = frozenset(range(3, 100))
    with pytest.raises(InputError, match="no actor could load the model: no memory"):
        spoken_by(ray, items)
    ray = StandIn(2)
    ray.unable = frozenset({2, 3, 4})
    found, _, told = spoken_by(ray, items)
    assert len(found) == 30 and 1 <= len(told) <= 3
    assert set(told) == {"actor 2 could not be started: no memory"}


def test_an_error_of_ours_ends_the_run_at_once() -> None:
    ray = StandIn(2)
    ray.unable, ray.why = frozenset({1, 2, 3}), "in its creation task\ndia_fast.errors.CheckpointError: it is damaged"
    with pytest.raises(InputError, match="^it is damaged$"):
        spoken_by(ray, [an_item("a"), an_item("b")])
    assert ray.made == 2


def test_one_deadly_item_fails_alone() -> None:
    ray = StandIn(2, deadly=frozenset({"i5"}))
    found, pool, told = spoken_by(ray, [an_item(f"i{number}") for number in range(12)])
    failed = [spoken for spoken in found if spoken.outcome is None]
    assert [spoken.id for spoken in failed] == ["i5"] and len(found) == 12
    assert failed[0].error == f"the process that spoke it was lost {MOST_LOSSES} times: The actor died."
    assert ray.begun.count("i5") == MOST_LOSSES and ["i5"] in ray.groups and len(told) == MOST_LOSSES


def test_a_single_actor_gets_all_and_several_get_shares() -> None:
    items = [an_item(f"i{number}") for number in range(40)]
    alone, several = StandIn(1), StandIn(2)
    spoken_by(alone, items)
    spoken_by(several, items)
    assert [len(group) for group in alone.groups] == [40], "its batch stays full until the end"
    sizes = [len(group) for group in several.groups]
    assert sizes[:2] == [10, 8] and sizes == sorted(sizes, reverse=True), "shares shrink, so that all end together"


def test_recordings_travel_with_their_items(tmp_path: Path) -> None:
    (tmp_path / "me.wav").write_bytes(b"sound")
    found, pool, _ = spoken_by(
        StandIn(1), [an_item("a", tmp_path / "me.wav"), an_item("b"), an_item("c", tmp_path / "me.wav")]
    )
    assert len(found) == 3 and len(pool.prompts) == 1


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError, match="no room for an actor of 4 CPUs and 0 GPUs: it has 2 and 0"):
        spoken_by(StandIn(2), [an_item("a")], cpus_per_actor=4)
    with pytest.raises(InputError, match="--actors 3: .* has room for 2"):
        spoken_by(StandIn(2), [an_item("a")], actors=3)
    with pytest.raises(InputError, match="has no room for an actor of 1 CPUs and 1 GPUs"):
        spoken_by(StandIn(2), [an_item("a")], gpus_per_actor=1)
    for wrong in ({"actors": 0}, {"cpus_per_actor": 0.0}, {"gpus_per_actor": -1.0}):
        with pytest.raises(InputError, match="must be"):
            PoolOptions("local", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["here", "10.0.0.1", "10.0.0.1:port", ":", ""])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InputError, match='HOST:PORT, ray://HOST:PORT, "auto" or "local", not'):
        check_address(address)


def test_nobody_at_the_address() -> None:
    with pytest.raises(InputError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*ray start --head"):
        check_address("127.0.0.1:1")


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | None] = []

    def health(command: list[str], env: Mapping[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
        modes.append(env.get("RAY_AUTH_MODE"))
        refused = modes[-1] != "token" or "--address" in command
        error = "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: missing" if refused else ""
        return subprocess.CompletedProcess(command, int(refused), "", error)

    monkeypatch.setattr(subprocess, "run", health)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_address("auto")  # as ray.init: a cluster that is found is given the token that this user has
    assert modes == [None, "token"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InputError, match=f"{address} asks for a token: set RAY_AUTH_MODE=token"):
            check_address(address)
        assert modes[2:] == [None], "a token is not sent to an address that was only named"
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(InputError, match="asks for a token"):
            check_address(address)


def test_what_kept_an_actor_from_loading_is_told_as_its_own_error() -> None:
    error = LostError(
        "The actor died because of an error raised in its creation task\ndia_fast.errors.InputError: no codec"
    )
    assert str(_cause(error)) == "no codec" and isinstance(_cause(error), InputError)
    known = LostError("The actor died")
    known.__cause__ = CheckpointError("damaged")
    assert _cause(known) is known.__cause__


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.jsonl").write_text('{"text": "[S1] Good morning."}\n')
    arguments = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--model", "demo", "--ray", "local"]
    assert main(arguments) == 2
    assert 'Ray is not installed: pip install "dia-fast[ray]"' in capsys.readouterr().err
    assert main([*arguments[:-2], "--actors", "2"]) == 2
    assert "--actors and --gpus-per-actor are for --ray ADDRESS" in capsys.readouterr().err


def test_an_item_is_what_an_actor_is_given() -> None:
    """The pool sends items as they are: they must stay small, and hold nothing of this process."""
    import pickle

    item = an_item("a")
    assert len(pickle.dumps(item)) < 4096 and pickle.loads(pickle.dumps(item)) == replace(item)
