"""A policy that knows the right tool calls of NeMo Gym's example rows, as actions and as an OpenAI server."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from raygym.nemo_gym.responses import chat_messages
from raygym.types import Message


def call(name: str, arguments: Any) -> Message:
    """An assistant's message with one tool call."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    calls = [{"id": "call00000", "type": "function", "function": {"name": name, "arguments": text}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def right_actions(row: Mapping[str, Any]) -> list[Message]:
    """What earns the full reward of a row of the four servers, told apart by their fields."""
    done: Message = {"role": "assistant", "content": str(row.get("answer") or "Done.")}
    if "ground_truth" in row:
        return [*(call(step["name"], step["arguments"]) for step in row["ground_truth"]), done]
    if "expected_count" in row:
        content = row["responses_create_params"]["input"][0]["content"]
        steps = [call("increment_counter", {"count": int(n)}) for n in re.findall(r"add (\d+)", content)]
        return [*steps, call("get_counter_value", {}), done]
    if "expected_synonyms" in row:
        steps = [call("get_synonym_value", {"synonym": word}) for word in row["expected_synonyms"]]
        return [*steps, call("extract_synonym_values", {"synonym_values": row["expected_synonym_values"]}), done]
    return [done]


WRONG: list[Message] = [call("no_such_tool", {"x": 1}), {"role": "assistant", "content": "I give up."}]


class ScriptedPolicy:
    """An OpenAI chat server. Its token IDs go on from those that came back to it, as a real one's do."""

    def __init__(self, rows: list[Mapping[str, Any]]) -> None:
        self._script = {self._key(chat_messages(row["responses_create_params"])): right_actions(row) for row in rows}
        self.wrong = False
        self.hold = threading.Event()
        self.hold.set()
        self.asked = 0
        self.url = ""

    @staticmethod
    def _key(messages: list[Message]) -> str:
        return next(str(message["content"]) for message in messages if message["role"] == "user")

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked += 1
        await asyncio.to_thread(self.hold.wait)
        messages = body["messages"]
        turn = sum(message["role"] == "assistant" for message in messages)
        actions = WRONG if self.wrong else self._script[self._key(messages)]
        message = {**actions[turn]}
        if "tool_calls" in message:
            message["tool_calls"] = [{**message["tool_calls"][0], "id": f"call{turn:05d}"}]
        prompt = self._prompt(messages)
        message |= {
            "prompt_token_ids": prompt,
            "generation_token_ids": [turn + 500, 2],
            "generation_log_probs": [-0.25, -0.5],
        }
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if "tool_calls" in message else "stop"}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 2, "total_tokens": len(prompt) + 2}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return web.json_response({**answer, "choices": [choice], "usage": usage})

    @staticmethod
    def _prompt(messages: list[Message]) -> list[int]:
        known = [i for i, message in enumerate(messages) if message.get("generation_token_ids")]
        if not known:
            assert not any(message["role"] == "assistant" for message in messages), "history came back without its IDs"
            return [10 + i for i in range(len(messages))]
        last = messages[known[-1]]
        return [*last["prompt_token_ids"], *last["generation_token_ids"], *(77 for _ in messages[known[-1] + 1 :])]

    @contextmanager
    def serving(self) -> Iterator[ScriptedPolicy]:
        """Listen, in a thread, while inside."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, shutdown_timeout=1)

        async def listen() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

        asyncio.run_coroutine_threadsafe(listen(), loop).result(10)
        try:
            yield self
        finally:
            self.hold.set()
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
