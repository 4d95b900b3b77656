"""Turns in lock-step: all episodes of a batch ask together, and none goes on before the slowest is answered."""

from __future__ import annotations

import asyncio

from raygym.episode import Generate
from raygym.types import Generation, Int32Array, Sampling

_Asked = tuple[Int32Array, Sampling, str, "asyncio.Future[Generation]"]


class LockStep:
    """A `Generate` over another one. Used from one event loop."""

    def __init__(self, generate: Generate) -> None:
        """`generate` answers one turn."""
        self._generate = generate
        self._playing = 0
        self._asked: list[_Asked] = []
        self._sending: set[asyncio.Task[None]] = set()

    def join(self) -> None:
        """One more episode plays: the others' turns wait for its own, until it leaves."""
        self._playing += 1

    def leave(self) -> None:
        """An episode that joined has ended."""
        self._playing -= 1
        self._send_if_all_asked()

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """This episode's continuation, at the moment when all have theirs."""
        answer: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._asked.append((prompt_token_ids, sampling, session_id, answer))
        self._send_if_all_asked()
        return await answer

    def _send_if_all_asked(self) -> None:
        if self._asked and len(self._asked) >= self._playing:
            asked, self._asked = self._asked, []
            task = asyncio.ensure_future(self._send(asked))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, asked: list[_Asked]) -> None:
        calls = [self._generate(prompt, sampling, session) for prompt, sampling, session, _ in asked]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for (*_, answer), result in zip(asked, results, strict=True):
            if answer.done():
                continue  # its episode gave up
            if isinstance(result, BaseException):
                answer.set_exception(result)
            else:
                answer.set_result(result)
