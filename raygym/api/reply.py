"""The engine's answer on its way to the client: token IDs are put on it, and the finished call is remembered."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from raygym.api.call import Call
from raygym.api.errors import error_body
from raygym.api.messages import responses_message

AsgiMessage = MutableMapping[str, Any]
Send = Callable[[AsgiMessage], Awaitable[None]]


class Reply:
    """An ASGI `send` that sees the whole answer: one JSON object, or a stream of server-sent events."""

    def __init__(self, call: Call, send: Send, history_header: str) -> None:
        self._call = call
        self._send = send
        self._header = history_header
        self._start: AsgiMessage = {}
        self._streams = False
        self._pieces: list[bytes] = []
        self._rest = b""
        self._message: dict[str, Any] = {"role": "assistant", "content": ""}

    async def __call__(self, message: AsgiMessage) -> None:
        """Pass on one ASGI message; an object is held back until it is whole, events go on as they come."""
        if message["type"] == "http.response.start":
            self._start = message
            kinds = [value for key, value in message.get("headers", ()) if key.lower() == b"content-type"]
            # What the engine answers decides, not what was asked: errors before the stream begins are objects.
            self._streams = bool(kinds) and kinds[0].startswith(b"text/event-stream")
            if self._streams:
                await self._send({**message, "headers": self._headers(None)})
        elif self._streams:
            await self._stream(message)
        else:
            self._pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                await self._whole(b"".join(self._pieces))

    @property
    def _ok(self) -> bool:
        return self._start.get("status") == 200

    def _headers(self, length: int | None) -> list[tuple[bytes, bytes]]:
        headers = [(key, value) for key, value in self._start.get("headers", ()) if key.lower() != b"content-length"]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        if self._ok and self._call.messages is not None:
            headers.append((self._header.encode(), self._call.outcome.value.encode()))
        return headers

    async def _whole(self, body: bytes) -> None:
        status = self._start["status"]
        if self._ok and self._call.kind != "tokenize":
            answer = json.loads(body)
            finish_answer(self._call, answer)
            body = json.dumps(answer).encode() if self._call.wants_ids else body
        elif status >= 400:
            text = _error_text(body)
            said = text or body.decode("utf-8", "replace") or f"the engine answered with status {status}"
            if status >= 500 and not self._call.reached_engine:
                # Whatever a strange value made fail before the engine was asked: a retry would fail as well.
                self._start = {**self._start, "status": 400}
                body = error_body(400, f"the request could not be understood: {said}")
            elif text is None:  # not OpenAI's error object, whatever the engine's framework made of it
                body = error_body(status, said)
        await self._send({**self._start, "headers": self._headers(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: AsgiMessage) -> None:
        *events, self._rest = (self._rest + message.get("body", b"")).split(b"\n\n")
        if not message.get("more_body") and self._rest:
            events, self._rest = [*events, self._rest], b""
        out = b"".join(self._event(event) + b"\n\n" for event in events)
        if out or not message.get("more_body"):
            await self._send({**message, "body": out})

    def _event(self, event: bytes) -> bytes:
        head, mark, data = event.partition(b"data: ")
        if not mark or not data.startswith(b"{"):
            return event
        payload = json.loads(data)
        changed = self._response_event(payload) if self._call.kind == "responses" else self._chunk(payload)
        return head + mark + json.dumps(payload).encode() if changed else event

    def _response_event(self, payload: dict[str, Any]) -> bool:
        if payload.get("type") not in ("response.completed", "response.incomplete"):
            return False
        finish_answer(self._call, payload["response"])
        return self._call.wants_ids

    def _chunk(self, payload: dict[str, Any]) -> bool:
        for choice in payload.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {"content": choice.get("text")}
            self._add(delta)
            if choice.get("finish_reason") is None:
                continue
            if self._call.finish(self._message) is not None and self._call.wants_ids:
                choice.setdefault("delta", {}).update(self._call.id_fields())
                return True
        return False

    def _add(self, delta: dict[str, Any]) -> None:
        self._message["content"] += delta.get("content") or ""
        for piece in delta.get("tool_calls") or ():
            calls = self._message.setdefault("tool_calls", [])
            while len(calls) <= piece.get("index", 0):
                calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
            call, function = calls[piece.get("index", 0)], piece.get("function") or {}
            call["id"] = piece.get("id") or call.get("id")
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""


def finish_answer(call: Call, answer: dict[str, Any]) -> None:
    """Remember a whole answer, and put the IDs on its message where they were asked for."""
    if call.kind == "responses":
        message, carrier = responses_message(answer), (answer.get("output") or [{}])[-1]
    elif call.kind == "chat":
        message = carrier = answer["choices"][0]["message"]
    else:
        message, carrier = {"role": "assistant", "content": answer["choices"][0].get("text")}, None
    if call.finish(message) is not None and call.wants_ids and carrier is not None:
        carrier.update(call.id_fields())


def _error_text(body: bytes) -> str | None:
    """The message of an OpenAI error object; None for anything else."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return message if isinstance(message, str) else None
