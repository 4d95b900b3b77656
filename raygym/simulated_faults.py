"""Injected faults of the simulated engine: an error, an answer that cannot be used, and the death of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np

from raygym.engine import EngineError
from raygym.types import Generation

T = TypeVar("T")


class SimulatedFault(RuntimeError):
    """An injected fault of the simulated engine."""


def garbage(generation: Generation, rng: np.random.Generator) -> Generation:
    """The generation with a token that cannot be one, or a logprob that is none, or without any tokens."""
    kind = rng.integers(3)
    if kind == 0:
        empty = np.empty(0, np.int32)
        return Generation(empty, np.empty(0, np.float32), empty, generation.finish_reason)
    at = rng.integers(len(generation.token_ids))
    token_ids, logprobs = generation.token_ids.copy(), generation.logprobs.copy()
    if kind == 1:
        token_ids[at] = -1
    else:
        logprobs[at] = np.nan
    return Generation(token_ids, logprobs, generation.weight_versions, generation.finish_reason)


class EngineLife:
    """An engine that dies with one of its generations: all others in it fail, and so does each later one."""

    def __init__(self, turns: int, may_die: Callable[[], bool]) -> None:
        """Alive.

        Args:
            turns: the generation that it dies of, counted from 1.
            may_die: asked at that generation; where the answer is no, the engine lives for ever.
        """
        self._turns = turns
        self._may_die = may_die
        self._begun = 0
        self._running: set[asyncio.Future[Any]] = set()
        self.dead = False

    def check(self) -> None:
        """Raises EngineError when it is dead."""
        if self.dead:
            raise EngineError(f"simulated engine: died at turn {self._turns} (policy.simulated.die_after_turns)")

    async def run(self, generation: Awaitable[T]) -> T:
        """The generation's result.

        Raises:
            EngineError: the engine is dead, or died meanwhile.
        """
        task = asyncio.ensure_future(generation)
        self._running.add(task)
        self._begun += 1
        if self._begun == self._turns and self._may_die():
            self.dead = True
        if self.dead:
            for running in self._running:
                running.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            # Either the engine died, or whoever asked has given up, which reaches the task by itself.
            caller = asyncio.current_task()
            if caller is None or not caller.cancelling():
                self.check()
            raise
        finally:
            self._running.discard(task)
