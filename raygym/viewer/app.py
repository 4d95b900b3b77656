"""The page's server: fixed files, and a few questions about one run. It answers GET only, and changes nothing.

What a run holds was written by a policy and its environments, so it is hostile: it leaves here as JSON only, the page
shows it as text, and the page's policy lets no script run but its own. `Host` is checked, so that no other web page can
reach the server under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raygym.viewer.run_folder import RunFolder
from raygym.viewer.table_query import QueryError, TableQuery
from raygym.viewer.trajectory_row import TrajectoryRow
from raygym.viewer.trajectory_view import conversation, token_part

HOSTS = ["127.0.0.1", "localhost"]
"""Names that this server answers to, on any port: it may be forwarded."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def viewer_app(run: RunFolder) -> Starlette:
    """The application for one run, which it starts to follow."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        run.start()
        yield
        run.stop()

    # A name that is asked for is looked up here and never becomes a path.
    routes = [
        Route("/" if name == "index.html" else f"/{name}", _asset(name, text)) for name, text in _assets().items()
    ]
    questions = {
        "run": lambda request: run.overview(),
        "status": lambda request: run.status(),
        "events": lambda request: {"events": run.events()},
        "metrics": lambda request: run.metrics.columns(_names(request)),
        "trajectories": lambda request: TableQuery.parse(request.query_params).answer(run.trajectories.rows),
        "trajectory": lambda request: _trajectory(run, _asked_row(run, request)),
        "tokens": lambda request: token_part(
            run.record(_asked_row(run, request)), _whole(request, "start"), run.token_text()
        ),
        "group": lambda request: _group(run, request),
    }
    routes += [Route(f"/api/{name}", _answer(question)) for name, question in questions.items()]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Guarded), Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)],
        exception_handlers={Exception: _failed},
        lifespan=lifespan,
    )


class _Guarded:
    """Sets the headers of every answer, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        await self._app(scope, receive, guarded)


class _NotFound(LookupError):
    pass


def _assets() -> dict[str, bytes]:
    folder = files("raygym.viewer").joinpath("static")
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def _asset(name: str, content: bytes) -> Callable[[Request], Response]:
    kind = _TYPES["." + name.rpartition(".")[2]]

    def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve


def _answer(question: Callable[[Request], Any]) -> Callable[[Request], Response]:
    # Not a coroutine: Starlette runs it in a thread, so that reading a long trajectory holds up nobody.
    def answer(request: Request) -> Response:
        try:
            return _json(question(request))
        except QueryError as error:
            return _json({"error": str(error)}, 400)
        except _NotFound as error:
            return _json({"error": str(error)}, 404)
        except (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            return _json({"error": f"this part of the run cannot be read: {type(error).__name__}: {error}"}, 422)

    return answer


def _failed(request: Request, error: Exception) -> Response:
    # It is sent from outside of `_Guarded`. The server tells the rest where it was started.
    answer = _json({"error": f"the viewer has failed at this: {type(error).__name__}: {error}"}, 500)
    answer.headers.update(_HEADERS)
    return answer


def _json(value: Any, status: int = 200) -> Response:
    # ASCII: what a policy wrote may hold half a surrogate pair, which is no UTF-8.
    return Response(json.dumps(value, allow_nan=False), status_code=status, media_type="application/json")


def _names(request: Request) -> list[str] | None:
    # One parameter each: an environment may have any character in its name, and so in those of its metrics.
    return request.query_params.getlist("name") or None


def _whole(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit()):
        raise QueryError(f"{name}={text}: expected a whole number from 0")
    return int(text)


def _asked_row(run: RunFolder, request: Request) -> TrajectoryRow:
    file, number = request.query_params.get("file", ""), _whole(request, "number")
    row = run.trajectories.find(file, number)
    if row is None:
        raise _NotFound(f"no trajectory {number} in {file!r} (yet)")
    return row


def _trajectory(run: RunFolder, row: TrajectoryRow) -> dict[str, Any]:
    siblings = run.trajectories.group(row.file, row.group_id)
    return {
        "row": row.shown(),
        "group": [{"number": other.number, "episode": other.episode, "reward": other.reward} for other in siblings],
        **conversation(run.record(row), run.token_text()),
    }


def _group(run: RunFolder, request: Request) -> dict[str, Any]:
    file, group_id = request.query_params.get("file", ""), request.query_params.get("group_id", "")
    rows = run.trajectories.group(file, group_id)
    if not rows:
        raise _NotFound(f"no group {group_id!r} in {file!r} (yet)")
    return {
        "episodes": [
            {"row": row.shown(), **{name: told[name] for name in ("messages", "turns", "turn_of", "logprob_of_turn")}}
            for row in rows
            for told in [conversation(run.record(row), None)]
        ]
    }
