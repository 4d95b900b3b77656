"""`ContinuousBatching` on an event loop: one timer for the engine's next event, however many generations run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raygym.batching_config import BatchingConfig
from raygym.simulated_batching import BatchedRequest, ContinuousBatching
from raygym.types import Int32Array


class BatchedGenerations:
    """Waits for generations as long as the batch takes for them. Used from one event loop, whose clock it goes by."""

    def __init__(self, config: BatchingConfig) -> None:
        """An idle engine."""
        self.batch = ContinuousBatching(config)
        """For its counters."""
        self._requests: dict[BatchedRequest, asyncio.Future[None]] = {}
        self._redrawn: dict[BatchedRequest, Callable[[int], Int32Array]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due_s: float | None = None

    async def run(
        self,
        prompt_token_ids: Int32Array,
        generated_token_ids: Int32Array,
        redrawn: Callable[[int], Int32Array],
    ) -> BatchedRequest:
        """Return when the last token is made. Cancelling it frees its place at once.

        Args:
            prompt_token_ids: P tokens.
            generated_token_ids: N tokens, as the weights of now make them.
            redrawn: all N as another version makes them; its share of them takes the place of those above.

        Raises:
            ValueError: the generation would never fit.
        """
        loop = asyncio.get_running_loop()
        request = self.batch.submit(loop.time(), prompt_token_ids, generated_token_ids)
        future = self._requests[request] = loop.create_future()
        self._redrawn[request] = redrawn
        self._set_timer(loop)
        try:
            await future
        finally:
            del self._redrawn[request]
            if self._requests.pop(request, None) is not None:
                self.batch.cancel(loop.time(), request)
                self._set_timer(loop)
        return request

    def pause(self) -> None:
        """Time stands still for all generations until `resume`."""
        loop = asyncio.get_running_loop()
        self.batch.pause(loop.time())
        self._set_timer(loop)

    def resume(self) -> None:
        """Time goes on."""
        loop = asyncio.get_running_loop()
        self.batch.resume(loop.time())
        self._set_timer(loop)

    def change_weights(self, version: int) -> None:
        """Tokens that are made from now on are of this version, and nothing that is cached can be used for them."""
        loop = asyncio.get_running_loop()
        for request in self._requests:
            made = self.batch.made(loop.time(), request)
            request.token_ids[request.prompt_tokens + made :] = self._redrawn[request](version)[made:]
        self.batch.change_weights(loop.time(), version)
        self._set_timer(loop)

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        due_s = self.batch.next_event_s()
        if due_s == self._due_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = due_s
        self._timer = None if due_s is None else loop.call_at(due_s, self._advance, loop, due_s)

    def _advance(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self._due_s = self._timer = None
        # Loops call a timer up to their clock's resolution early.
        for request in self.batch.advance(max(loop.time(), due_s)):
            future = self._requests.pop(request, None)
            if future is not None and not future.done():
                future.set_result(None)
        self._set_timer(loop)
