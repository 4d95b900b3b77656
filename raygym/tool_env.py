"""`ToolEnv`: an environment whose methods are the policy's tools.

class Shop(ToolEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stock = int(self.np_random.integers(1, 100))
        return "How many lamps are in stock? Answer with the number only.", {}

    @tool
    def count(self, item: Literal["lamp", "chair"]) -> int:
        \"\"\"Count what is in stock.

        Args:
            item: what to count.
        \"\"\"
        return self.stock if item == "lamp" else 0

    def answer(self, text):
        return 1.0 if text.strip() == str(self.stock) else 0.0
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, overload

import numpy as np

from raygym.env import ChatEnv, EnvError
from raygym.env_host import DeadlineMissed, in_own_thread, within
from raygym.tools import Tool, ToolError, as_text
from raygym.types import Message

__all__ = ["End", "ToolEnv", "ToolError", "tool"]

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_raygym_tool"


@overload
def tool(function: F) -> F: ...
@overload
def tool(*, timeout_s: float | None = None) -> Callable[[F], F]: ...
def tool(function: F | None = None, *, timeout_s: float | None = None) -> F | Callable[[F], F]:
    """Mark a method of a `ToolEnv` as a tool: `@tool` or `@tool(timeout_s=2.0)`.

    Args:
        function: the method, plain or `async def`.
        timeout_s: deadline of one call; without it the environment's `tool_timeout_s`.
    """

    def mark(marked: F) -> F:
        setattr(marked, _MARK, timeout_s)
        return marked

    return mark(function) if function is not None else mark


@dataclass(frozen=True, slots=True)
class End:
    """Returned by a tool or by a hook of `ToolEnv`: the episode ends with this reward."""

    reward: float
    text: str = ""
    """Shown to the policy as the tool's result; recorded as a last message where a hook returns it."""
    truncated: bool = False
    """The task was cut short (for example after too many turns) instead of finished."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Logged as `info["metrics"]`."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What `reward` consists of, by name, as `info["rewards"]`."""


class ToolEnv(ChatEnv):
    """Methods marked `@tool`, and the plain functions in `functions`, are what the policy can call.

    Name, schema and validation of a tool come from its signature, type hints and docstring (Google, NumPy or reST
    style; `Args` become descriptions). What a tool returns is shown as text: strings as they are, everything else as
    JSON. Whatever goes wrong in a call (an unknown tool, wrong arguments, an exception, a missed deadline) is shown as
    text too, and the episode goes on. A tool that wants to complain in its own words raises `ToolError`.

    Plain tools and plain hooks run in threads, asynchronous ones on the event loop, so a tool that blocks holds up
    nobody else. A thread cannot be stopped: a plain tool that misses its deadline goes on alone, unheard.
    """

    functions: Sequence[Callable[..., Any]] = ()
    """Tools that are no methods; may be set in the constructor."""
    parallel: bool = True
    """Whether the calls of one message run at the same time. If not, each waits for the one before it: wanted where
    tools change a common state. Results are in the order of the calls either way."""
    tool_timeout_s: float | None = None
    """Deadline of one call, where `@tool` names none."""

    @property
    def tools(self) -> Sequence[dict[str, Any]]:  # type: ignore[override]
        """OpenAI tool schemas.

        Raises:
            EnvError: a tool lacks a docstring or a type hint, or two have the same name.
        """
        return [described.schema for described, _ in self._tools.values()]

    # Any: both hooks may also be coroutines.
    def answer(self, text: str) -> Any:
        """What follows when the policy calls no tool.

        Args:
            text: what the policy said.

        Returns:
            A number: the episode ends with this reward. An `End`: the same, with more to say. Anything else: the next
            observation (text or chat messages), and the episode goes on.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement answer(self, text)")

    def after_calls(self) -> Any:
        """Called when all calls of a message were answered: return an `End` to end the episode, else None."""
        return None

    async def step(  # type: ignore[override]  # Gymnasium knows no coroutines
        self, action: Message
    ) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Run the calls of the policy's message, or hand its text to `answer`."""
        calls = action.get("tool_calls") or []
        if not calls:
            answered = _ended(await _call(partial(self.answer, action["content"])))
            if isinstance(answered, End):
                return _last(answered.text or None, answered)
            return answered, 0.0, False, False, {}
        results = await self._run(calls)
        messages = [_result_message(call, result) for call, result in zip(calls, results, strict=True)]
        end = next((result for result in results if isinstance(result, End)), None)
        if end is None:
            end = _ended(await _call(self.after_calls))
        if end is None:
            return messages, 0.0, False, False, {}
        if not isinstance(end, End):
            raise EnvError(f"{type(self).__name__}.after_calls returned {end!r}; expected an End, a number or None")
        return _last(messages, end)

    async def _run(self, calls: Sequence[Message]) -> list[End | str]:
        if self.parallel:
            return list(await asyncio.gather(*(self._result(call["function"]) for call in calls)))
        return [await self._result(call["function"]) for call in calls]

    async def _result(self, call: Message) -> End | str:
        """What one call gives: text, or the episode's end. Raises nothing."""
        name = call["name"]
        described, timeout_s = self._tools.get(name, (None, None))
        if described is None:
            return f"Error: there is no tool {name!r}; expected one of {', '.join(self._tools)}"
        try:
            arguments = described.arguments(call["arguments"])
            limit = math.inf if timeout_s is None else timeout_s
            result = await within(_call(partial(described.function, **arguments)), limit)
            return replace(result, text=as_text(result.text)) if isinstance(result, End) else as_text(result)
        except ToolError as error:
            return f"Error: {error}"
        except DeadlineMissed:
            return f"Error: {name} took longer than {timeout_s:g} s"
        except Exception as error:
            return as_text(f"Error: {name} raised {type(error).__name__}: {error}")

    @property
    def _tools(self) -> dict[str, tuple[Tool, float | None]]:
        """By name: the tool and its deadline in seconds."""
        found: dict[str, tuple[Tool, float | None]] = {}
        for function in [*self._methods(), *self.functions]:
            described = Tool.of(function)
            if described.name in found:
                raise EnvError(
                    f"{type(self).__name__} has two tools named {described.name!r}; expected one of each name"
                )
            timeout_s = getattr(function, _MARK, None)
            found[described.name] = described, self.tool_timeout_s if timeout_s is None else timeout_s
        return found

    def _methods(self) -> list[Callable[..., Any]]:
        # Base classes first, each in the order of its source; what a subclass overrides keeps its place.
        names = dict.fromkeys(name for cls in reversed(type(self).__mro__) for name in vars(cls))
        # Looked up on the class first: properties, such as `tools` itself, are not to be evaluated.
        return [getattr(self, name) for name in names if hasattr(getattr(type(self), name, None), _MARK)]


async def _call(function: Callable[[], Any]) -> Any:
    """Await a coroutine function here, run anything else in a thread."""
    inner = function.func if isinstance(function, partial) else function
    try:
        result = function() if inspect.iscoroutinefunction(inner) else await in_own_thread(function)
        return await result if inspect.isawaitable(result) else result
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error  # as itself it would end the event loop


def _ended(result: Any) -> Any:
    return End(float(result)) if isinstance(result, numbers.Real | np.bool_) else result


def _last(observation: Any, end: End) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    info: dict[str, Any] = {"metrics": dict(end.metrics)}
    if end.rewards:
        info["rewards"] = dict(end.rewards)
    return observation, end.reward, not end.truncated, end.truncated, info


def _result_message(call: Message, result: End | str) -> Message:
    text = result.text if isinstance(result, End) else result
    return {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": text}
