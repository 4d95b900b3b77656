"""A fake policy behind OpenAI's chat API: after a fixed time, the next call of a counter's script. Simulated."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

_STOP_TIMEOUT_S = 10
# 16 tokens an answer, as many as an answer of raygym's simulated engine has at most.
_ANSWER = list(range(100, 116))


class FakePolicy:
    """Answers turn k of `turns` with a tool call, and the last with a message; IDs go on from those that come back."""

    def __init__(self, turns: int, latency_s: float) -> None:
        """It takes `latency_s` for each answer, whatever else it has to do."""
        self._turns = turns
        self._latency_s = latency_s
        self._asked = self._answered = 0
        self._first_s = self._last_s = 0.0
        self._done = threading.Event()
        self._expected = 0
        self._at: dict[str, Callable[[], None]] = {}
        self.url = ""

    def expect(self, answers: int, at_first: Callable[[], None], at_last: Callable[[], None]) -> None:
        """Count from here; the two are called once each, in a thread, at the first question and the last answer."""
        self._asked = self._answered = 0
        self._expected = answers
        self._at = {"first": at_first, "last": at_last}
        self._done.clear()

    def seconds(self, timeout_s: float, asking: Callable[[], bool]) -> float:
        """From the first question to the last answer, when it has been given.

        Raises:
            TimeoutError: it has not, after `timeout_s` seconds or when nobody is `asking` any more.
        """
        ends_s = time.monotonic() + timeout_s
        while not self._done.wait(1.0) and asking() and time.monotonic() < ends_s:
            pass
        if not self._done.is_set():
            raise TimeoutError(f"the policy gave {self._answered} of {self._expected} answers")
        return self._last_s - self._first_s

    @contextmanager
    def serving(self) -> Iterator[FakePolicy]:
        """Listen, in a thread, while inside."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)

        async def listen() -> None:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

        asyncio.run_coroutine_threadsafe(listen(), loop).result(_STOP_TIMEOUT_S)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(_STOP_TIMEOUT_S)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    async def _chat(self, request: web.Request) -> web.Response:
        asked_s = time.monotonic()
        self._asked += 1
        if self._asked == 1:
            self._first_s = asked_s
            await asyncio.to_thread(self._at["first"])
        body = await request.json()
        answer = self._answer(body)
        await asyncio.sleep(max(0.0, asked_s + self._latency_s - time.monotonic()))
        self._answered += 1
        if self._answered == self._expected:
            self._last_s = time.monotonic()
            await asyncio.to_thread(self._at["last"])
            self._done.set()
        return web.json_response(answer)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        messages = body["messages"]
        answers = [message for message in messages if message["role"] == "assistant"]
        turn = len(answers) + 1
        message: dict[str, Any] = {"role": "assistant", "content": "It is done."}
        if turn < self._turns:
            name, arguments = (
                ("increment_counter", '{"count": 1}') if turn < self._turns - 1 else ("get_counter_value", "{}")
            )
            function = {"name": name, "arguments": arguments}
            message = {"role": "assistant", "content": ""}
            message["tool_calls"] = [{"id": f"call{turn:05d}", "type": "function", "function": function}]
        prompt = list(range(32))
        if answers and answers[-1].get("generation_token_ids"):
            prompt = [*answers[-1]["prompt_token_ids"], *answers[-1]["generation_token_ids"], *range(200, 216)]
        message |= {
            "prompt_token_ids": prompt,
            "generation_token_ids": _ANSWER,
            "generation_log_probs": [-0.5] * len(_ANSWER),
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(_ANSWER)}
        return {
            "id": f"chatcmpl-{turn}",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": message, "finish_reason": "tool_calls" if turn < self._turns else "stop"}
            ],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
