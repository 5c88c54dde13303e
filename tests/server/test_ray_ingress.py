"""The ingress in front of replicas that are lost: what reaches the client is what one replica would have said."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra server is not installed")
from dia_fast.errors import InputError
from dia_fast.server.ray_serve import (
    Board,
    Ingress,
    Lost,
    Passed,
    RayOptions,
    merged_pages,
    plain_scope,
)

SOUND = bytes(range(200))
START = ("start", 200, [(b"content-type", b"audio/wav"), (b"x-seed", b"77"), (b"x-request-id", b"a")])
EVENTS = ("start", 200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-seed", b"77")])


def cut_at(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def event(sound: bytes) -> bytes:
    told = {"type": "speech.audio.delta", "audio": base64.b64encode(sound).decode()}
    return f"event: speech.audio.delta\ndata: {json.dumps(told)}\n\n".encode()


class Replicas:
    """Each answer is a list of messages; one that ends with `Lost` is that of a replica that goes away."""

    def __init__(self, *answers: list[Any]) -> None:
        self.left, self.bodies = list(answers), list[bytes]()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
        self.bodies.append(body)
        for item in self.left.pop(0):
            if item is Lost:
                raise Lost("gone")
            yield item


def sent(replicas: Replicas, path: str = "/v1/audio/speech", body: bytes = b'{"input": "Hi."}') -> list[dict[str, Any]]:
    """The messages that the client of one request gets."""
    out: list[dict[str, Any]] = []

    async def run() -> None:
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            out.append(dict(message))

        async def page() -> bytes:
            return b"page"

        ingress = Ingress(replicas.answer, None, page, 1000)  # type: ignore[arg-type]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        await ingress(scope, receive, send)

    asyncio.run(run())
    return out


def body_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(message["body"] for message in messages[1:])


def whole(messages: list[dict[str, Any]]) -> bool:
    return messages[-1].get("more_body") is False


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300)), st.lists(st.integers(0, 300)), st.integers(0, 20))
def test_bytes_go_on_where_they_stopped(first: list[int], second: list[int], until: int) -> None:
    before = [("body", data, True) for data in cut_at(SOUND, first)][:until]
    after = [("body", data, True) for data in cut_at(SOUND, second)]
    replicas = Replicas([START, *before, Lost], [START, *after, ("body", b"", False)])
    messages = sent(replicas)
    assert body_of(messages) == SOUND and whole(messages)
    assert [message["type"] for message in messages].count("http.response.start") == 1
    assert (b"x-request-id", b"a") not in messages[0]["headers"]
    assert json.loads(replicas.bodies[1]) == {"input": "Hi.", "seed": 77}, "the other one needs the seed that was drawn"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300)), st.lists(st.integers(0, 300)), st.integers(0, 20), st.integers(1, 60))
def test_events_go_on_where_their_sound_stopped(first: list[int], second: list[int], until: int, piece: int) -> None:
    def stream(cuts: list[int]) -> bytes:
        return b": waiting\n\n" + b"".join(event(part) for part in cut_at(SOUND, cuts))

    def messages_of(data: bytes) -> list[Any]:
        return [("body", data[at : at + piece], True) for at in range(0, len(data), piece)]

    done = b"event: speech.audio.done\ndata: {}\n\n"
    replicas = Replicas(
        [EVENTS, *messages_of(stream(first))[:until], Lost],
        [EVENTS, *messages_of(stream(second) + done), ("body", b"", False)],
    )
    messages = sent(replicas)
    events = body_of(messages).split(b"\n\n")
    found = [json.loads(item.partition(b"data: ")[2]) for item in events if b"speech.audio.delta" in item]
    assert b"".join(base64.b64decode(item["audio"]) for item in found) == SOUND
    assert events[-2:] == [done.strip(), b""] and whole(messages)


def test_before_its_beginning_any_request_is_asked_again() -> None:
    replicas = Replicas([Lost], [("start", 200, []), ("body", b"{}", False)])
    messages = sent(replicas, "/v1/models", b"")
    assert messages[0]["status"] == 200 and body_of(messages) == b"{}" and replicas.bodies == [b"", b""]


def test_two_losses_are_told() -> None:
    replicas = Replicas([Lost], [Lost], [Lost])
    messages = sent(replicas)
    assert messages[0]["status"] == 503 and b"replica_lost" in body_of(messages)
    begun = sent(Replicas([START, ("body", b"ab", True), Lost], [START, ("body", b"abc", True), Lost]))
    assert body_of(begun) == b"abc" and not whole(begun), "the client sees that it is not the end"


def test_what_is_no_speech_is_not_gone_on_with() -> None:
    begun = sent(Replicas([("start", 200, []), ("body", b"ab", True), Lost], []), "/v1/audio/voices", b"")
    assert body_of(begun) == b"ab" and not whole(begun)


def test_a_failed_answer_does_not_end_as_a_whole_one() -> None:
    messages = sent(Replicas([START, ("body", b"ab", True)]))
    assert body_of(messages) == b"ab" and not whole(messages)


def test_bodies_are_limited_before_they_travel() -> None:
    replicas = Replicas()
    messages = sent(replicas, body=b"x" * 1001)
    assert messages[0]["status"] == 413 and replicas.bodies == []


def test_nothing_is_skipped_without_a_loss() -> None:
    passed = Passed()
    passed.begin("/v1/audio/speech", 200, START[2], b"{}")
    assert passed.new(b"abc") + passed.new(b"def") == b"abcdef"


def test_pages_are_told_apart_by_their_replica() -> None:
    def page(count: int) -> bytes:
        return b'# HELP a_requests_total n\n# TYPE a_requests_total counter\na_requests_total{x="1"} %d.0\n' % count

    merged = merged_pages({"one": page(2), "two": page(3)}).decode()
    assert 'a_requests_total{replica="one",x="1"} 2.0' in merged
    assert 'a_requests_total{replica="two",x="1"} 3.0' in merged
    assert merged.count("# TYPE a_requests_total") == 1


def test_a_replica_that_is_not_heard_of_leaves_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    board.put("one", b"1")
    assert board.pages() == {"one": b"1"}
    monkeypatch.setattr("dia_fast.server.ray_serve._STALE_SECONDS", 0.0)
    assert board.pages() == {}


def test_a_scope_can_travel() -> None:
    import pickle

    scope = {"type": "http", "path": "/", "headers": [(b"a", b"b")], "app": object(), "client": ["h", 1], "state": {}}
    assert pickle.loads(pickle.dumps(plain_scope(scope))) == {
        "type": "http", "path": "/", "headers": [(b"a", b"b")], "client": ("h", 1), "server": None,
    }  # fmt: skip


def test_options_that_cannot_be() -> None:
    for wrong in ({"replicas": 0}, {"replicas": 2, "max_replicas": 1}, {"cpus_per_replica": 0.0}):
        with pytest.raises(InputError, match="must be"):
            RayOptions("local", **wrong)  # type: ignore[arg-type]
