"""What stands before the engine's OpenAI app: keys, limits, sessions, token IDs on messages, errors for people."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from raygym.api.call import Call, current_call
from raygym.api.errors import ApiError
from raygym.api.history import KnownHistories, carried_ids
from raygym.api.messages import engine_message, responses_carried
from raygym.api.reply import Reply
from raygym.api.sampling import SamplingProfile
from raygym.api.sessions import SessionStore

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

SESSION_HEADER = "x-raygym-session"
PROFILE_HEADER = "x-raygym-profile"
HISTORY_HEADER = "x-raygym-history"
_KINDS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/completions": "completion",
    "/tokenize": "tokenize",
}
_OPEN_PATHS = ("/health",)
# vLLM's app has more (scaling of expert groups, other vendors' conventions) that is not for a policy's clients.
_SERVED = ("/health", "/ping", "/version", "/load", "/tokenize", "/detokenize", "/tokenizer_info", "/metrics", "/docs")
_SERVED_BELOW = ("/v1/", "/docs/", "/openapi.json")
_METRICS_PATH = "/metrics"


@dataclass(slots=True)
class FrontOptions:
    """How a front behaves."""

    api_key: str = field(default="", repr=False)
    """Empty: everybody who reaches the port is served."""
    max_body_bytes: int = 32 << 20
    profiles: Mapping[str, SamplingProfile] = field(default_factory=lambda: {"train": SamplingProfile(1.0)})
    """The first is used by calls that name none."""


class ApiFront:
    """An ASGI application around an engine's."""

    def __init__(
        self,
        app: AsgiApp,
        sessions: SessionStore,
        options: FrontOptions | None = None,
        metrics: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """Wrap an engine's app.

        Args:
            app: serves `/v1/*`, `/tokenize` and so on; looks for its call in `current_call`.
            sessions: of this replica.
            options: see `FrontOptions`.
            metrics: the text of `/metrics`; without it the engine's own are served.
        """
        self._app = app
        self._sessions = sessions
        self._options = options or FrontOptions()
        self._metrics = metrics
        self._known = KnownHistories()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            # None of the API is there, and what an engine's app may have for some models would be open to all.
            await send({"type": "websocket.close", "code": 1008, "reason": "the API has no websockets"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._serve(scope, receive, send)
        except ApiError as error:
            await _answer(send, error.status, error.body())

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        path = scope["path"]
        if path not in _OPEN_PATHS:
            self._check_key(headers)
        session_id = headers.get(SESSION_HEADER, "")
        if path == "/sessions" or path.startswith("/sessions/"):
            session_id, rest = split_session(path)
            if not rest:
                body = await self._read(receive, headers)
                await self._session_call(scope["method"], session_id, body, send)
                return
            path = rest
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if path not in _SERVED and not path.startswith(_SERVED_BELOW):
            raise ApiError(404, f"{path}: nothing is served here; the API is below /v1", code="not_found")
        if path == _METRICS_PATH and self._metrics is not None and scope["method"] == "GET":
            await _answer(send, 200, (await self._metrics()).encode(), b"text/plain; version=0.0.4; charset=utf-8")
            return
        if scope["method"] == "POST":
            # Read here, so that the limit holds for every path of the engine's.
            raw = await self._read(receive, headers)
            if path in _KINDS:
                await self._generate(_KINDS[path], session_id, raw, headers, (scope, receive, send))
                return
            receive = _with_body(raw, receive)
        await self._app(scope, receive, send)

    def _check_key(self, headers: Mapping[str, str]) -> None:
        key = self._options.api_key
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            problem = "the API key is missing or wrong; send `Authorization: Bearer <key>`"
            raise ApiError(401, problem, code="invalid_api_key")

    async def _read(self, receive: Receive, headers: Mapping[str, str]) -> bytes:
        limit = self._options.max_body_bytes
        problem = f"the request body is larger than {limit} bytes (policy.http.max_body_mib)"
        too_large = ApiError(413, problem, code="body_too_large")
        if headers.get("content-length", "").isdecimal() and int(headers["content-length"]) > limit:
            raise too_large
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client closed the connection before its request was complete")
            piece = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise too_large
            pieces.append(piece)
            if not message.get("more_body"):
                return b"".join(pieces)

    async def _session_call(self, method: str, session_id: str, raw: bytes, send: Send) -> None:
        if not session_id and method == "POST":
            body = _json_object(raw) if raw.strip() else {}
            name = body.get("profile", next(iter(self._options.profiles)))
            self._profile(name)
            metadata = body.get("metadata") or {}
            if not isinstance(metadata, dict):
                raise ApiError(400, "metadata: expected an object", "metadata")
            session = self._sessions.create(name, metadata)
            answer: dict[str, Any] = {
                "id": session.session_id,
                "base_url": f"/sessions/{session.session_id}/v1",
                "profile": session.profile,
                "ttl_s": self._sessions.ttl_s,
            }
            await _answer(send, 201, json.dumps(answer).encode())
        elif session_id and method in ("GET", "DELETE"):
            session = self._sessions.get(session_id) if method == "GET" else self._sessions.close(session_id)
            answer = {
                "id": session.session_id,
                "profile": session.profile,
                "metadata": session.metadata,
                "status": "open" if method == "GET" else "closed",
                "calls": len(session.calls),
                "forks": session.forks,
                "segments": session.segments(),
            }
            await _answer(send, 200, json.dumps(answer).encode())
        else:
            raise ApiError(405, "sessions: POST /sessions opens one, GET or DELETE /sessions/<id> reads or closes it")

    def _profile(self, name: Any) -> SamplingProfile:
        profiles = self._options.profiles
        if not isinstance(name, str) or name not in profiles:
            problem = f"there is no sampling profile {name!r}; expected one of {', '.join(profiles)}"
            raise ApiError(400, f"profile: {problem}", "profile")
        return profiles[name]

    async def _generate(
        self, kind: str, session_id: str, raw: bytes, headers: Mapping[str, str], asgi: tuple[Scope, Receive, Send]
    ) -> None:
        scope, receive, send = asgi
        body = _json_object(raw)
        session = self._sessions.get(session_id) if session_id else None
        if session is not None:
            self._sessions.check_room()
        call = Call(kind, self._known, session=session, store=self._sessions)
        if kind != "tokenize":
            name = session.profile if session else headers.get(PROFILE_HEADER, next(iter(self._options.profiles)))
            self._profile(name).apply(name, body)
        _take_token_request(call, body)
        reply = Reply(call, send, HISTORY_HEADER)
        scope = {**scope, "headers": _with_length(scope["headers"], encoded := _encoded(body))}
        token = current_call.set(call)
        try:
            await self._app(scope, _with_body(encoded, receive), reply)
        finally:
            current_call.reset(token)


def _take_token_request(call: Call, body: dict[str, Any]) -> None:
    """Move what is about tokens from the body to the call, and the messages into the shape that engines take."""
    if call.kind == "chat" or (call.kind == "tokenize" and "messages" in body):
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages) or not messages:
            raise ApiError(400, "messages: expected a list of at least one message object", "messages")
        call.carried = carried_ids(messages)
        body["messages"] = [engine_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        call.wants_ids = bool(body.get("return_token_ids") or body.get("logprobs"))
    elif call.kind == "responses":
        call.carried_turns, body["input"] = responses_carried(body.get("input"))
        include = body.get("include") or []
        if not isinstance(include, list):
            raise ApiError(400, f"include: expected a list, found {include!r:.80}", "include")
        call.wants_ids = bool(body.get("return_token_ids") or "message.output_text.logprobs" in include)
    elif call.kind == "completion" and call.session is not None:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            raise ApiError(400, "prompt: a session records one prompt a call; ask once for each", "prompt")
    if call.kind != "tokenize" and (call.wants_ids or call.session is not None or call.carried):
        if body.get("n") not in (None, 1):
            raise ApiError(400, f"n: {body['n']!r} answers in one call cannot be trained on; ask once for each", "n")
        if body.get("use_beam_search"):
            raise ApiError(400, "use_beam_search: beams are not samples of the policy; leave it out", "use_beam_search")
        if call.wants_ids and "top_logprobs" in body and body["top_logprobs"] is None:
            problem = "null together with a request for token IDs; leave it out or send 0"
            raise ApiError(400, f"top_logprobs: {problem}", "top_logprobs")


def split_session(path: str) -> tuple[str, str]:
    """The session's ID and the rest of the path, of a path below `/sessions`; either may be empty."""
    session_id, _, rest = path.removeprefix("/sessions").removeprefix("/").partition("/")
    return session_id, f"/{rest}" if rest else ""


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request body is not JSON: {error}", None, "invalid_json") from error
    if not isinstance(body, dict):
        problem = f"the request body is a JSON {type(body).__name__}; expected an object"
        raise ApiError(400, problem, code="invalid_json")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        problem = "the request body holds half of a surrogate pair, which is no character"
        raise ApiError(400, problem, code="invalid_json") from error


def _with_length(headers: Any, body: bytes) -> list[tuple[bytes, bytes]]:
    changed = (b"content-length", b"transfer-encoding", b"content-type")
    kept = [(key, value) for key, value in headers if key.lower() not in changed]
    return [*kept, (b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]


def _with_body(body: bytes, receive: Receive) -> Receive:
    given = False

    async def next_message() -> AsgiMessage:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


async def _answer(send: Send, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
