"""One environment behind deadlines: plain methods run in a thread of its own, coroutines on the event loop.

A thread per environment instead of a pool: everything that an environment does happens in one thread (database handles
and the like need that), a method that hangs takes no other environment's place, and no exit waits for it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import gymnasium

from raygym.env import EnvError, StepResult, env_tools, parse_reset, parse_step
from raygym.memory_limit import allow_stacks
from raygym.testing import chaos
from raygym.types import EpisodeFailure, FailureKind, Message, Task

logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0
T = TypeVar("T")


class DeadlineMissed(Exception):
    """What was waited for did not finish in time. Apart from TimeoutError, which user code may raise itself."""


async def within(awaitable: Awaitable[T], timeout_s: float) -> T:
    """Await with a deadline that holds even when the awaited code ignores its cancellation.

    Raises:
        DeadlineMissed: `timeout_s` seconds have passed; the awaited code was cancelled and is no longer waited for.
        RuntimeError: the awaited code cancelled itself.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({future}, timeout=max(0.0, timeout_s))
    except asyncio.CancelledError:
        _abandon(future)
        raise
    if not done:
        _abandon(future)
        raise DeadlineMissed
    if future.cancelled():
        # Passing this on as a cancellation would look as if our own caller had given up.
        raise RuntimeError("it was cancelled from inside")
    return future.result()


def _abandon(future: asyncio.Future[Any]) -> None:
    # Its late exception has nobody to go to; without this, asyncio would log it as never retrieved.
    future.add_done_callback(lambda f: f.cancelled() or f.exception())
    future.cancel()


class Host(Protocol):
    """One environment, wherever it lives. Every failure is an EpisodeFailure with its kind."""

    tools: list[dict[str, Any]]
    """The environment's OpenAI tool schemas, as they were after its reset."""

    async def reset(self, task: Task, timeout_s: float) -> list[Message]:
        """Make the environment and reset it, both within `timeout_s` seconds. Returns the first messages."""

    async def step(self, action: Message, timeout_s: float) -> StepResult:
        """One step within `timeout_s` seconds."""

    async def close(self) -> None:
        """Close the environment, if it was made. Does not raise: the episode is over by then."""


async def in_own_thread(call: Callable[[], T]) -> T:
    """Run one blocking call in a thread of its own, which nothing else waits for, not even the program's exit.

    Raises:
        RuntimeError: the call raised what would end an event loop: SystemExit, KeyboardInterrupt or StopIteration.
        BaseException: whatever else it raised.
    """
    worker = _Worker()
    future: asyncio.Future[T] = worker.submit(call)
    worker.stop()
    return await future


class EnvHost:
    """A `Host` in this process."""

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]]) -> None:
        """`make` is called by the first `reset`, in the environment's own thread."""
        self._make = make
        self._env: gymnasium.Env[Any, Any] | None = None
        self._worker = _worker()
        self._stuck = False
        self.tools: list[dict[str, Any]] = []
        self.close_problem = ""

    async def reset(self, task: Task, timeout_s: float) -> list[Message]:
        """See `Host`."""
        return await self._guarded("reset", self._start(task), timeout_s)

    async def step(self, action: Message, timeout_s: float) -> StepResult:
        """See `Host`."""
        assert self._env is not None, "reset comes first"
        return await self._guarded("step", self._step(self._env, action), timeout_s)

    @property
    def env(self) -> gymnasium.Env[Any, Any]:
        """The environment that the last `reset` made."""
        assert self._env is not None, "reset comes first"
        return self._env

    async def close(self) -> None:
        """See `Host`. Trouble is logged, and noted in `close_problem`."""
        if self._env is None:
            # Queued behind a constructor that hangs: should it ever return, its environment is closed.
            self._worker.submit(self._close_late)
            self._worker.stop()
            return
        if _closes_nothing(self._env):
            self._worker.stop() if self._stuck else self._worker.leave()
            return
        worker = _Worker() if self._stuck else self._worker
        closed = False
        try:
            await within(self._call(self._env.close, worker), _CLOSE_TIMEOUT_S)
            closed = True
        except DeadlineMissed:
            logger.warning("%s.close() still runs after %s s; left alone", type(self._env).__name__, _CLOSE_TIMEOUT_S)
            self.close_problem = f"close still runs after {_CLOSE_TIMEOUT_S:g} s"
        except Exception as error:
            logger.warning("%s.close() raised", type(self._env).__name__, exc_info=True)
            self.close_problem = f"close raised {type(error).__name__}: {error}"
        finally:
            if closed and not self._stuck:
                worker.leave()
            else:
                worker.stop()
                self._worker.stop()

    async def _start(self, task: Task) -> list[Message]:
        result = await self._worker.submit(partial(self._construct_and_reset, task))
        messages = parse_reset(await result if inspect.isawaitable(result) else result)
        assert self._env is not None
        self.tools = env_tools(self._env)
        if not self._stuck and inspect.iscoroutinefunction(self._env.step) and _closes_nothing(self._env):
            # Nothing of it will run in a thread any more, and thousands of idle ones are no small thing.
            self._worker.leave()
            self._worker = _Worker()
        return messages

    def _construct_and_reset(self, task: Task) -> Any:
        # In one call: each one waits for the thread, and the event loop for its answer. A coroutine's body runs later.
        self._env = self._make()
        if self._stuck:
            raise RuntimeError("it was given up while it was being made")
        return self._env.reset(seed=task.seed, options={"split": task.split})

    def _close_late(self) -> None:
        if self._env is not None and not inspect.iscoroutinefunction(self._env.close):
            self._env.close()

    async def _step(self, env: gymnasium.Env[Any, Any], action: Message) -> StepResult:
        chaos.at("env.step")
        return parse_step(await self._call(partial(env.step, action), self._worker))

    async def _call(self, method: Callable[[], Any], worker: _Worker) -> Any:
        function = method.func if isinstance(method, partial) else method
        if inspect.iscoroutinefunction(function):
            return await method()
        result = await worker.submit(method)
        return await result if inspect.isawaitable(result) else result

    async def _guarded(self, what: str, call: Awaitable[T], timeout_s: float) -> T:
        try:
            return await within(call, timeout_s)
        except DeadlineMissed as error:
            self._stuck = True
            raise EpisodeFailure(FailureKind.ENV_TIMEOUT, f"env.{what} took longer than {timeout_s:.3g} s") from error
        except asyncio.CancelledError:
            self._stuck = True
            raise
        except EpisodeFailure:
            raise
        except EnvError as error:
            raise EpisodeFailure(FailureKind.ENV_ERROR, str(error)) from error
        except Exception as error:
            raise EpisodeFailure(FailureKind.ENV_ERROR, f"env.{what} raised {type(error).__name__}: {error}") from error


def _closes_nothing(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether `close` is the one of gymnasium's base class, which is empty."""
    return getattr(env.close, "__func__", None) is gymnasium.Env.close


_IDLE_WORKERS = 16
_idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()


def _worker() -> _Worker:
    """One that a closed environment left, or a new one: starting a thread stops the event loop for a millisecond."""
    try:
        return _idle.get_nowait()
    except queue.Empty:
        return _Worker()


class _Worker:
    """One daemon thread, started at the first call, that runs calls in order."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="raygym-env", daemon=True)
            allow_stacks(1)
            self._thread.start()
        future = asyncio.get_running_loop().create_future()
        self._calls.put((call, future))
        return future

    def stop(self) -> None:
        self._calls.put(None)

    def leave(self) -> None:
        """All calls have returned: another environment may have the thread."""
        if self._thread is None or _idle.qsize() >= _IDLE_WORKERS:
            self.stop()
        else:
            _idle.put(self)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            result: Any = None
            error: BaseException | None = None
            try:
                result = call()
            # An environment that calls sys.exit, or lets StopIteration out, must not end the event loop.
            except (SystemExit, KeyboardInterrupt, StopIteration) as raised:
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
            except BaseException as raised:
                error = raised
            _settle_from_thread(future, result, error)
            # Otherwise the frame keeps the last call's results, and the environment, alive while it waits.
            del item, call, future, result, error
        allow_stacks(-1)


def _settle_from_thread(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:
        logger.debug("an environment's method returned after its event loop was closed")
