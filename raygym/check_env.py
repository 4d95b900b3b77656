"""`check_env`: what is wrong with a user's environment, in words, before a run pays for finding out."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium

from raygym.check_tools import tool_problems
from raygym.env import EnvError, StepResult, components_problem, make_env
from raygym.env_host import EnvHost
from raygym.types import EpisodeFailure, Message, Task

_REPLIES = ("1", "", "I do not know.")
# Far above what a busy machine adds, and far below what 2,000 episodes on one event loop could bear.
_BLOCKED_S = 0.25
_BEAT_S = 0.01


def check_env(
    env: Any, kwargs: Mapping[str, Any] | None = None, *, max_turns: int = 64, timeout_s: float = 30.0
) -> list[str]:
    """Play short episodes as a run would, and report every way in which `env` breaks the contract; [] is good.

    Checked: that `reset` and `step` can be called as runs do, return what they should with finite rewards, and answer
    any reply, also calls of unknown tools or with malformed arguments; that what a reward is said to consist of sums to
    it; that one seed gives the same episode twice; that it ends; that tools are OpenAI's schemas; that async methods do
    not block; that `close` works; that kwargs pickle.
    Raises and prints nothing. Works inside a running event loop too, which it does block.

    Args:
        env: an id or `module:Class`, made anew for each episode as in a run; or an environment, which is closed.
        kwargs: of the constructor, for an id.
        max_turns: by when an episode must have ended.
        timeout_s: deadline of each `reset` and `step`, in seconds.
    """
    if isinstance(env, str):
        return _check_id(env, dict(kwargs or {}), max_turns, timeout_s)
    if not isinstance(env, gymnasium.Env):
        return [f"{type(env).__name__} is no gymnasium.Env; subclass raygym.ChatEnv"]
    return _call_problems(env) or _run(_Check(lambda: env, False, max_turns, timeout_s).splits())


def _check_id(env_id: str, kwargs: dict[str, Any], max_turns: int, timeout_s: float) -> list[str]:
    problems = []
    try:
        pickle.dumps(kwargs)
    except Exception as error:  # each kind of object refuses in its own way
        problems.append(
            f"kwargs cannot be pickled ({error}); Ray sends them to its actors: use plain values, as YAML has them"
        )
    try:
        env = make_env(env_id, kwargs)
    except EnvError as error:
        return [*problems, str(error)]
    except Exception as error:  # whatever a user's code raises is the finding
        return [*problems, f"{env_id} with {kwargs} cannot be made: it raised {type(error).__name__}: {error}"]
    if calls := _call_problems(env):
        return [*problems, *calls]
    try:
        # As an EnvRunner does after it has looked at a new environment.
        if not inspect.iscoroutinefunction(env.close):
            env.close()
    except Exception as error:
        problems.append(f"close before any reset raised {type(error).__name__}: {error}")
    return [*problems, *_run(_Check(partial(make_env, env_id, kwargs), True, max_turns, timeout_s).splits())]


def _call_problems(env: gymnasium.Env[Any, Any]) -> list[str]:
    problems = []
    for method, wanted in ((env.unwrapped.reset, "reset(seed=..., options=...)"), (env.unwrapped.step, "step(action)")):
        signature = inspect.signature(method)
        try:
            if wanted.startswith("reset"):
                signature.bind(seed=0, options={})
            else:
                signature.bind({})
        except TypeError as error:
            name = wanted.partition("(")[0]
            problems.append(f"{name}{signature} cannot be called as {wanted}: {error}")
    return problems


def _run(check: Coroutine[Any, Any, list[str]]) -> list[str]:
    # In a thread of its own, since the caller may be inside an event loop.
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(check)), name="raygym-check-env")
    thread.start()
    thread.join()
    return list(dict.fromkeys(found))


@dataclass
class _Check:
    """Plays each split twice with one seed and the same replies."""

    make: Callable[[], gymnasium.Env[Any, Any]]
    anew: bool
    """Whether `make` makes a new environment each time, as runs do."""
    max_turns: int
    timeout_s: float
    problems: list[str] = field(default_factory=list)
    blocking: set[str] = field(default_factory=set)
    """Methods that were found to block the event loop: told once."""

    async def splits(self) -> list[str]:
        host = EnvHost(self.make)
        for split in ("train", "validation"):
            episodes: list[list[Any] | None] = []
            for _ in range(2):
                if self.anew and episodes:
                    await self._close(host)
                    host = EnvHost(self.make)
                episodes.append(await self._play(host, split))
                if episodes[-1] is None:
                    break
            first, again = episodes[0], episodes[-1]
            if len(episodes) == 2 and first is not None and again is not None:
                self._compare(first, again, split)
            if self.anew:
                await self._close(host)
                host = EnvHost(self.make)
        await self._close(host)
        return self.problems

    async def _play(self, host: EnvHost, split: str) -> list[Any] | None:
        """First messages and step results, or None where `reset` failed."""
        where = f"reset in split {split}"
        try:
            async with self._watched(where):
                seen: list[Any] = [await host.reset(Task(index=0, env="check", seed=0, split=split), self.timeout_s)]
        except EpisodeFailure as failure:
            self.problems.append(f"{where}: {failure.detail}")
            return None
        if tools := tool_problems(getattr(host.env.unwrapped, "tools", ())):
            self.problems += tools
            return seen
        replies = _replies(host.tools)
        for turn in range(self.max_turns):
            where = f"step {turn + 1} in split {split}"
            try:
                async with self._watched(where):
                    step = await host.step(replies[turn % len(replies)], self.timeout_s)
            except EpisodeFailure as failure:
                self.problems.append(f"{where}: {failure.detail}")
                return seen
            seen.append(step)
            if problem := _unnamed_rewards(seen[1:]):
                self.problems.append(f"{where}: {problem}")
                return seen
            if step.terminated or step.truncated:
                return seen
        self.problems.append(
            f"an episode in split {split} did not end within {self.max_turns} turns; let it end by itself, since "
            "rollout.max_turns cuts it wherever it is"
        )
        return seen

    def _compare(self, first: list[Any], again: list[Any], split: str) -> None:
        if first[0] != again[0]:
            self.problems.append(
                f"reset(seed=0) in split {split} gave two different first observations; draw everything from "
                "self.np_random after super().reset(seed=seed), so that a retried episode meets the same task"
            )
            return
        for turn, (one, other) in enumerate(zip(first[1:], again[1:], strict=False), start=1):
            if one != other:
                self.problems.append(
                    f"after reset(seed=0) in split {split}, the same replies were answered differently at step {turn}: "
                    f"{_shown(one)} and {_shown(other)}; draw everything from self.np_random"
                )
                return

    async def _close(self, host: EnvHost) -> None:
        await host.close()
        if host.close_problem:
            self.problems.append(host.close_problem)

    @asynccontextmanager
    async def _watched(self, where: str) -> AsyncIterator[None]:
        """Reports how long the event loop stood still meanwhile; only a coroutine of the environment's can do that."""
        longest, asleep = 0.0, time.monotonic()

        def woke() -> None:
            nonlocal longest, asleep
            longest, asleep = max(longest, time.monotonic() - asleep - _BEAT_S), time.monotonic()

        async def beat() -> None:
            while True:
                await asyncio.sleep(_BEAT_S)
                woke()

        heart = asyncio.create_task(beat())
        try:
            yield
        finally:
            woke()
            heart.cancel()
            method = where.split()[0]
            if longest > _BLOCKED_S and method not in self.blocking:
                self.blocking.add(method)
                self.problems.append(
                    f"{where} blocked the event loop for {longest:.2f} s; await what takes time, or write a plain "
                    "method, which gets a thread of its own"
                )


def _unnamed_rewards(steps: list[StepResult]) -> str:
    """What is wrong where some steps tell what their reward consists of and others do not."""
    named: dict[str, float] = {}
    for step in steps:
        for name, reward in step.reward_components.items():
            named[name] = named.get(name, 0.0) + reward
    problem = components_problem(named, sum(step.reward for step in steps)) if named else ""
    return problem and f'some steps tell info["rewards"] and others do not: the episode has {problem}'


def _replies(tools: list[dict[str, Any]]) -> list[Message]:
    """What an untrained policy may say: text, and where there are tools every kind of wrong call."""
    replies: list[Message] = [{"role": "assistant", "content": text} for text in _REPLIES]
    calls = [(tool["function"]["name"], "{}") for tool in tools]
    if calls:
        calls += [(calls[0][0], '{"unknown": 1}'), (calls[0][0], "{not json"), ("no_such_tool", "{}")]
    for number, (name, arguments) in enumerate(calls):
        call = {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}
        replies.append({"role": "assistant", "content": "", "tool_calls": [call]})
    return replies


def _shown(step: StepResult) -> str:
    text = f"{[message['content'] for message in step.messages]}, reward {step.reward:g}"
    return text if len(text) <= 120 else text[:117] + "..."
