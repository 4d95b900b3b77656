"""Environments in processes of their own: a Ray actor each, kept for the next episode, replaced when it is not well."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from raygym.backoff import Backoff
from raygym.config import EnvConfig
from raygym.env import StepResult, make_env
from raygym.env_host import DeadlineMissed, EnvHost, within
from raygym.memory_limit import limit_memory
from raygym.types import EpisodeFailure, FailureKind, Message, Task

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 6.0
_ANSWER_TIMEOUT_S = 10.0
# The process keeps the deadline itself and says what missed it; only one that is stuck whole gets this much more.
_GRACE_S = 1.0


class EnvProcess:
    """Hosts one environment at a time. Wrapped as a Ray actor by `EnvProcesses`."""

    def __init__(self, config: EnvConfig) -> None:
        self._config = config
        self._host: EnvHost | None = None
        limit_memory(config.memory_mib)

    async def ready(self) -> None:
        """The process is up."""

    async def reset(self, task: Task, timeout_s: float) -> tuple[list[Message], list[dict[str, Any]]]:
        """A fresh environment, reset. Returns its first messages and its tools."""
        self._host = EnvHost(partial(make_env, self._config.id, self._config.kwargs))
        return await self._host.reset(task, timeout_s), self._host.tools

    async def step(self, action: Message, timeout_s: float) -> StepResult:
        """One step."""
        assert self._host is not None, "reset comes first"
        return await self._host.step(action, timeout_s)

    async def close(self) -> None:
        """Close the environment."""
        host, self._host = self._host, None
        if host is not None:
            await host.close()


class ProcessHost:
    """A `Host` whose environment lives in an `EnvProcess`."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.tools: list[dict[str, Any]] = []
        self.usable = True
        """Whether the process can host another environment: all its calls came back, none out of memory."""
        self.died = False
        """The process is gone."""

    async def reset(self, task: Task, timeout_s: float) -> list[Message]:
        """See `Host`."""
        call = self._process.reset.remote(task, timeout_s)
        messages: list[Message]
        messages, self.tools = await self._answer(call, "reset", timeout_s)
        return messages

    async def step(self, action: Message, timeout_s: float) -> StepResult:
        """See `Host`."""
        result: StepResult = await self._answer(self._process.step.remote(action, timeout_s), "step", timeout_s)
        return result

    async def close(self) -> None:
        """See `Host`. A process that is stuck is ended by the pool instead."""
        if not self.usable:
            return
        try:
            await within(asyncio.wrap_future(self._process.close.remote().future()), _CLOSE_TIMEOUT_S)
        except (DeadlineMissed, RayError) as error:
            logger.warning("closing an environment's process: %s", error)
            self.usable = False

    async def _answer(self, reference: Any, what: str, timeout_s: float) -> Any:
        try:
            return await within(asyncio.wrap_future(reference.future()), max(0.0, timeout_s) + _GRACE_S)
        except DeadlineMissed:
            self.usable = False
            raise EpisodeFailure(FailureKind.ENV_TIMEOUT, f"env.{what} took longer than {timeout_s:.3g} s") from None
        except asyncio.CancelledError:
            self.usable = False
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EpisodeFailure):
                # A timeout leaves a thread that still runs; after a MemoryError nothing in there can be relied on.
                self.usable = cause.kind is not FailureKind.ENV_TIMEOUT and "MemoryError" not in cause.detail
                raise EpisodeFailure(cause.kind, cause.detail) from None
            self.usable = False
            raise EpisodeFailure(FailureKind.ENV_ERROR, f"env.{what} raised {type(cause).__name__}: {cause}") from None
        except RayActorError as error:
            self.usable, self.died = False, True
            first = str(error).strip().splitlines()[0]
            raise EpisodeFailure(FailureKind.ENV_LOST, f"its process died in env.{what}: {first}") from None


class EnvProcesses:
    """The processes of one environment of the run, started when they are needed."""

    def __init__(self, config: EnvConfig) -> None:
        self._config = config
        self._places = asyncio.Semaphore(config.processes or 2 * (os.cpu_count() or 1))
        self._idle: list[Any] = []
        # Idle ones, when another one died: a machine takes all with it, which no episode should find out one by one.
        self._doubtful: list[Any] = []
        self._backoff = Backoff(first_s=0.5, most_s=30.0)

    @asynccontextmanager
    async def host(self) -> AsyncIterator[ProcessHost]:
        """A host with a process of its own; waits while all processes are taken.

        Raises:
            EpisodeFailure: `env_lost`, the process did not start.
        """
        async with self._places:
            process = self._idle.pop() if self._idle else await self._proven() or await self._start()
            host = ProcessHost(process)
            try:
                yield host
            finally:
                if host.usable:
                    self._idle.append(process)
                else:
                    ray.kill(process)
                if host.died:
                    self._doubtful += self._idle
                    self._idle = []

    async def _proven(self) -> Any:
        """A doubtful one that answers; None: there is none."""
        while self._doubtful:
            process = self._doubtful.pop()
            try:
                await within(asyncio.wrap_future(process.ready.remote().future()), _ANSWER_TIMEOUT_S)
            except (DeadlineMissed, RayError):
                ray.kill(process)
            except asyncio.CancelledError:
                self._doubtful.append(process)
                raise
            else:
                return process
        return None

    async def _start(self) -> Any:
        # A process that dies again and again must not be started again and again at full speed.
        await asyncio.sleep(self._backoff.wait_s())
        actor: Any = ray.remote(EnvProcess)
        process = actor.options(num_cpus=0, max_restarts=0, max_concurrency=4).remote(self._config)
        try:
            await within(asyncio.wrap_future(process.ready.remote().future()), _START_TIMEOUT_S)
        except asyncio.CancelledError:
            ray.kill(process)
            raise
        except (DeadlineMissed, RayError) as error:
            self._backoff.failed()
            ray.kill(process)
            detail = f"not up within {_START_TIMEOUT_S:.0f} s" if isinstance(error, DeadlineMissed) else str(error)
            raise EpisodeFailure(FailureKind.ENV_LOST, f"a process for {self._config.label}: {detail}") from error
        self._backoff.succeeded()
        return process
