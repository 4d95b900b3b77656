"""`check_env`: what is wrong with a user's environment, in words, before a run pays for finding out."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium

from raygym.env import EnvError, env_tools, parse_reset, parse_step
from raygym.types import Message

_MAX_STEPS = 16
_REPLIES = ("1", "", "I do not know.")


def check_env(env: Any) -> list[str]:
    """Play a short episode in each split and report every way in which `env` breaks the contract; [] is good.

    Checked: the types that `reset` and `step` return, finite rewards, tools, and that `reset` with one seed gives the
    same first observation twice. Runs its own event loop, so do not call it from inside one.
    """
    if not isinstance(env, gymnasium.Env):
        return [f"{type(env).__name__} is no gymnasium.Env; subclass raygym.ChatEnv"]
    return [*_tool_problems(env_tools(env)), *asyncio.run(_play_splits(env))]


def _tool_problems(tools: list[Any]) -> list[str]:
    return [
        f'tools[{index}] is {tool!r}; expected {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
        for index, tool in enumerate(tools)
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or "name" not in tool["function"]
    ]


async def _play_splits(env: gymnasium.Env[Any, Any]) -> list[str]:
    problems: list[str] = []
    for split in ("train", "validation"):
        first = await _reset(env, split, problems)
        again = await _reset(env, split, problems) if first is not None else None
        if first is None or again is None:
            continue
        if first != again:
            problems.append(
                f"reset(seed=0) in split {split} gave two different first observations; draw everything from "
                "self.np_random after super().reset(seed=seed), so that a retried episode meets the same task"
            )
        await _play(env, split, problems)
    return list(dict.fromkeys(problems))


async def _reset(env: gymnasium.Env[Any, Any], split: str, problems: list[str]) -> list[Message] | None:
    reset = partial(env.reset, seed=0, options={"split": split})
    messages: list[Message] | None = await _checked(reset, parse_reset, f"reset in split {split}", problems)
    return messages


async def _play(env: gymnasium.Env[Any, Any], split: str, problems: list[str]) -> None:
    for index in range(_MAX_STEPS):
        action: Message = {"role": "assistant", "content": _REPLIES[index % len(_REPLIES)]}
        step = await _checked(partial(env.step, action), parse_step, f"step {index + 1} in split {split}", problems)
        if step is None or step.terminated or step.truncated:
            return


async def _checked(call: Callable[[], Any], parse: Callable[[Any], Any], where: str, problems: list[str]) -> Any:
    try:
        result = call()
        return parse(await result if inspect.isawaitable(result) else result)
    except EnvError as error:
        problems.append(f"{where}: {error}")
    except Exception as error:  # whatever a user's code raises is the finding
        problems.append(f"{where} raised {type(error).__name__}: {error}")
    return None
