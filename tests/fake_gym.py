"""A stand-in for NeMo Gym's servers, in this process: a counter with sessions in cookies, a game, and an agent."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from raygym.nemo_gym.endpoints import Endpoint, write_endpoints
from raygym.nemo_gym.layout import Layout, Server
from raygym.nemo_gym.play import Play
from raygym.nemo_gym.rows import Source

TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
ROW: dict[str, Any] = {
    "responses_create_params": {"input": [{"role": "user", "content": "Count to 3."}], "tools": [TOOL]},
    "expected": 3,
}
Handler = Callable[[dict[str, Any]], Any]


@dataclass
class FakeGym:
    """What the servers do, and what they were asked."""

    verdict: Handler = lambda body: {**body, "reward": 1.0}
    run: Handler = lambda body: {**body, "reward": 1.0}
    calls: list[tuple[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        """Both flavours of a resources server and an agent, on one port."""
        app = web.Application()
        app.router.add_post("/{path:.*}", self._post)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        path, body = request.match_info["path"], await request.json()
        self.calls.append((path, body))
        # As the real ones: the cookie changes with every answer, and only the last one is good.
        session, _, turn = request.cookies.get("session", f"{uuid.uuid4().hex}.0").partition(".")
        status, answer = self._answer(path, session, body)
        response = web.Response(text=answer if isinstance(answer, str) else json.dumps(answer), status=status)
        response.set_cookie("session", f"{session}.{int(turn) + 1}")
        response.set_cookie("other", "kept")
        return response

    def _answer(self, path: str, session: str, body: Any) -> tuple[int, Any]:
        if path in ("seed_session", "reset"):
            self.counts[session] = 0
            return 200, {"observation": "Begin.", "info": {}} if path == "reset" else {}
        if path == "add":
            if not isinstance(body, dict) or not isinstance(body.get("n"), int):
                return 422, {"detail": "n: expected an integer"}
            self.counts[session] += body["n"]
            return 200, f"now {self.counts[session]}"
        if path == "step":
            self.counts[session] += 1
            done = self.counts[session] == 2
            answer = {"observation": None if done else "Again.", "reward": 0.5, "terminated": done, "truncated": False}
            return 200, {**answer, "info": {"level": self.counts[session]}}
        if path == "close_session":
            self.closed.append(session)
            return 200, {}
        if path in ("verify", "run"):
            answer = (self.verdict if path == "verify" else self.run)({**body, "count": self.counts.get(session)})
            return answer if isinstance(answer, tuple) else (200, answer)
        return 404, {"detail": "Not Found"}


@asynccontextmanager
async def playing(
    gym: FakeGym, folder: Path, *rows: dict[str, Any], mode: str = "resources", gymnasium: bool = False, turns: int = 8
) -> AsyncIterator[Play]:
    """A `Play` against `gym`, which listens while inside."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)))
    files = (Source(str(folder / "rows.jsonl")),)
    reference = {"resources_server": {"type": "resources_servers", "name": "counter"}}
    models = {"model_server": {"type": "responses_api_models", "name": "policy_model"}}
    servers = {
        "counter": Server("counter", "resources_servers", "counter", {"entrypoint": "app.py"}),
        "counter_agent": Server("counter_agent", "responses_api_agents", "simple_agent", {**reference, **models}),
        "policy_model": Server("policy_model", "responses_api_models", "vllm_model", {"entrypoint": "app.py"}),
    }
    layout = Layout(servers, mode, "counter_agent" if mode == "agent" else "counter")
    async with TestServer(gym.app()) as server:
        at = Endpoint(str(server.make_url("")).rstrip("/"), gymnasium, closes=not gymnasium)
        write_endpoints(folder / "servers.json", {name: at for name in servers})
        yield Play(layout, {"train": files, "validation": files}, "policy", turns, str(folder / "servers.json"))
