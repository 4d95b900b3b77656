"""Keys at the front: for every kind of connection, whatever the engine's app would do with it."""

from __future__ import annotations

from typing import Any

import pytest

from raygym.api.front import ApiFront, FrontOptions
from raygym.api.sessions import SessionStore
from raygym.nemo_gym.resolve import Policy, Resolved


async def call(scope: dict[str, Any], key: str = "right") -> tuple[list[str], list[dict[str, Any]]]:
    """Which kinds of connection reached the engine's app, and what was sent."""
    reached: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    sessions = SessionStore("replica", ttl_s=60, max_sessions=1, max_bytes=1 << 20)
    await ApiFront(app, sessions, FrontOptions(api_key=key))(scope, receive, send)
    return reached, sent


def http(path: str, key: bytes | None) -> dict[str, Any]:
    headers = [] if key is None else [(b"authorization", b"Bearer " + key)]
    return {"type": "http", "method": "GET", "path": path, "headers": headers}


async def test_a_websocket_does_not_pass_by_the_key() -> None:
    for headers in ([], [(b"authorization", b"Bearer right")]):
        reached, sent = await call({"type": "websocket", "path": "/v1/realtime", "headers": headers})
        assert reached == []
        assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


async def test_what_starts_and_ends_the_app_does_pass() -> None:
    assert (await call({"type": "lifespan"}))[0] == ["lifespan"]


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/sessions/x", "/tokenize", "/nothing"])
@pytest.mark.parametrize("key", [None, b"", b"wrong", b"righ", b"right2", "r\u00efght".encode()])
async def test_no_path_but_health_is_open(path: str, key: bytes | None) -> None:
    reached, sent = await call(http(path, key))
    assert reached == [] and sent[0]["status"] == 401
    assert (await call(http("/health", key)))[0] == ["http"]


async def test_a_key_may_have_any_characters() -> None:
    key = "gr\u00fcn-\u9375"
    assert (await call(http("/v1/models", key.encode()), key))[0] == ["http"]


def test_keys_are_in_no_text_of_what_holds_them(tmp_path: Any) -> None:
    held = [FrontOptions(api_key="canary"), Policy("u", "m", "canary"), Resolved({"k": "canary"}, tmp_path, "python")]
    assert [text for text in map(repr, held) if "canary" in text] == []
