"""A resources server as an environment: raygym itself calls the tools and asks for the verdict, no agent in between."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raygym.env import ChatEnv, EnvError
from raygym.nemo_gym.client import GymClient, ServerRefused
from raygym.nemo_gym.endpoints import find_endpoint
from raygym.nemo_gym.play import Play
from raygym.nemo_gym.responses import (
    arguments_text,
    call_output_item,
    chat_messages,
    chat_tools,
    output_items,
    response_object,
    tool_message,
)
from raygym.nemo_gym.rows import Row
from raygym.nemo_gym.verdict import Verdict, numbers, read_verdict
from raygym.types import Message

# The server's own paths. A policy that calls a tool of this name must not seed its session anew or grade itself.
_OWN_PATHS = {"", "seed_session", "close_session", "verify", "aggregate_metrics", "reset", "step", "close", "mcp"}
_CLOSE_TIMEOUT_S = 2.0


class ResourcesEnv(ChatEnv):
    """One episode on a resources server of either flavour: tools and a verifier, or reset and step."""

    def __init__(self, play: Play) -> None:
        """`play` says where the server is and which rows there are. Nothing is called before `reset`."""
        self._play = play
        self._client: GymClient | None = None
        self._row: Row | None = None
        self._server = ""
        self._items: list[dict[str, Any]] = []
        self._steps = 0
        self._max_steps = play.max_turns
        self._gymnasium = False
        self._close_path = ""

    # Gymnasium's own types know only plain methods.
    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> Any:
        """Open the row's session. Its messages are the observation, its tools are `self.tools`."""
        super().reset(seed=seed)
        row = self._play.row(seed or 0, (options or {}).get("split", "train"))
        server = self._play.target(row)
        published = Path(self._play.endpoints)
        endpoint = await find_endpoint(published, server)
        await self.close()
        self._client, self._server, self._row = GymClient(endpoint.url, server, published), server, row
        self._items, self._steps, self._gymnasium = [], 0, endpoint.gymnasium
        self._max_steps = min(self._play.max_turns, self._play.max_steps(row) or self._play.max_turns)
        params = row.data["responses_create_params"]
        messages = chat_messages(params)
        answer = await self._ask("reset" if endpoint.gymnasium else "seed_session", dict(row.data))
        if endpoint.gymnasium:
            if (answer.get("info") or {}).get("supports_explicit_close"):
                self._close_path = "close"
            if answer.get("observation"):
                messages.append({"role": "user", "content": str(answer["observation"])})
        elif endpoint.closes:
            self._close_path = "close_session"
        self.tools = chat_tools(params.get("tools"))
        return messages, {"row": row.where}

    async def step(self, action: Message) -> Any:  # type: ignore[override]
        """Run the policy's tool calls, in their order; without any, or at the last step, ask for the verdict."""
        items = output_items(action)
        self._items += items
        self._steps += 1
        last = self._steps >= self._max_steps
        if self._gymnasium:
            return await self._gymnasium_step(items, last)
        outputs = [await self._call(call) for call in action.get("tool_calls") or ()]
        self._items += [call_output_item(message["tool_call_id"], message["content"]) for message in outputs]
        if outputs and not last:
            return outputs, 0.0, False, False, {}
        answer = await self._ask("verify", self._with_response(self._items))
        verdict = read_verdict(answer, self._known)
        # An agent that has used up its steps is graded as well, but it did not end the episode itself.
        return outputs, verdict.reward, not outputs, bool(outputs), _info(verdict, {})

    async def _gymnasium_step(self, items: Sequence[dict[str, Any]], last: bool) -> Any:
        answer = await self._ask("step", self._with_response(items))
        verdict = read_verdict(answer, {*self._known, "terminated", "truncated"})
        terminated, info = bool(answer.get("terminated")), answer.get("info") or {}
        outputs = [tool_message(o["call_id"], o["output"]) for o in info.get("tool_outputs") or ()]
        if answer.get("observation"):
            outputs.append({"role": "user", "content": str(answer["observation"])})
        truncated = not terminated and (bool(answer.get("truncated")) or last)
        return outputs, verdict.reward, terminated, truncated, _info(verdict, numbers(info))

    async def close(self) -> None:  # type: ignore[override]
        """Release the session where the server can, and close the connection."""
        client, path = self._client, self._close_path
        self._client, self._close_path = None, ""
        if client is None:
            return
        try:
            if path:
                session = uuid.uuid4().hex
                body = {"resources_session_id": session, "episode_id": {"rollout_id": session, "attempt": 0}}
                # The episode is over: what a server says to this no longer matters.
                await asyncio.wait_for(client.post(path, body if path == "close_session" else {}), _CLOSE_TIMEOUT_S)
        except Exception:
            return
        finally:
            await client.close()

    async def _call(self, call: dict[str, Any]) -> Message:
        name, arguments = str(call["function"]["name"]), arguments_text(call["function"].get("arguments"))
        assert self._client is not None, "reset comes first"
        try:
            body = json.loads(arguments)
        except ValueError as error:
            return tool_message(call["id"], json.dumps({"error": f"the arguments of {name} are not JSON: {error}"}))
        if name in _OWN_PATHS:
            return tool_message(call["id"], json.dumps({"error": f"there is no tool {name!r}"}))
        # Whatever the status: an error is for the policy to read, too.
        _, text = await self._client.post(name, body)
        return tool_message(call["id"], text)

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        assert self._client is not None, "reset comes first"
        try:
            return await self._client.ask(path, body)
        except ServerRefused as refused:
            raise EnvError(str(refused)) from refused

    def _with_response(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        assert self._row is not None, "reset comes first"
        params = self._row.data["responses_create_params"]
        return {**self._row.data, "response": response_object(params, items, self._play.model)}

    @property
    def _known(self) -> set[str]:
        assert self._row is not None, "reset comes first"
        return {*self._row.data, "response"}


def _info(verdict: Verdict, numbers: dict[str, float]) -> dict[str, Any]:
    info = {"metrics": {**numbers, **verdict.metrics}}
    return {**info, "rewards": verdict.reward_components} if verdict.reward_components else info
