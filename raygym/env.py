"""The environment contract: a `gymnasium.Env` whose observations and actions are chat messages, found by id.

What a user's environment returns is read by `parse_reset` and `parse_step`, which say in words what is wrong with it.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np

import raygym.envs  # noqa: F401 - registers the built-in environments
from raygym.errors import RaygymError
from raygym.installed_envs import installed_env, installed_env_ids
from raygym.types import Message

_SUM_TOLERANCE = 1e-6
"""Of a reward's components, relative to the reward where that is above 1."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


class EnvError(RaygymError, ValueError):
    """An environment that cannot be made, or that returned something outside the contract. The text says which."""


class ChatSpace(gymnasium.Space[Any]):
    """The space of everything that `normalize_observation` accepts: text, one chat message, or a list of them."""

    def __init__(self) -> None:
        """All chat spaces are the same."""
        super().__init__()

    @property
    def is_np_flattenable(self) -> bool:
        """Chat messages have no array form."""
        return False

    def contains(self, x: Any) -> bool:
        """Whether `x` is text, a chat message or a list of chat messages."""
        try:
            normalize_observation(x)
        except EnvError:
            return False
        return True

    def sample(self, mask: Any = None, probability: Any = None) -> Message:
        """One assistant message: the digits of a random number."""
        return {"role": "assistant", "content": str(self.np_random.integers(0, 1000))}

    def __eq__(self, other: object) -> bool:
        """All chat spaces are the same."""
        return isinstance(other, ChatSpace)

    def __hash__(self) -> int:
        """All chat spaces are the same."""
        return hash(ChatSpace)


class ChatEnv(gymnasium.Env[Any, Message]):
    """Base class of environments that talk with the policy. Implement `reset` and `step`, plain or `async def`.

    An observation is text (one user message), one chat message, or a list of them; `reset` may begin with a system
    message. Plain methods run in a thread of the environment's own, always the same one, so they may block. The
    constructor runs there too: open what needs an event loop in an async `reset`.
    """

    tools: Sequence[dict[str, Any]] = ()
    """OpenAI tool schemas that the chat template shows to the policy."""
    observation_space = ChatSpace()
    action_space = ChatSpace()

    # Any, since the methods may also be coroutines.
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode. Call `super().reset(seed=seed)` first: it seeds `self.np_random`.

        Args:
            seed: which task; the same seed and split must give the same task.
            options: `{"split": "train"}` or `{"split": "validation"}`.

        Returns:
            `(observation, info)`.
        """
        return super().reset(seed=seed, options=options)

    def step(self, action: Message) -> Any:
        """Answer the policy's message `{"role": "assistant", "content": text}`.

        Returns:
            `(observation, reward, terminated, truncated, info)`; scalars in `info["metrics"]` of the last step are
            logged. `info["rewards"]`, numbers by name that sum to the reward, tells what it consists of
            (`learner.reward_weights`, `learner.advantage: gdpo`); who names a part of an episode's reward names all of
            it. The observation may be None when the episode ends.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement step(self, action)")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one `env.step` returned, checked."""

    messages: list[Message]
    """New messages; may be empty only when the episode ended."""
    reward: float
    terminated: bool
    truncated: bool
    metrics: dict[str, float]
    """`info["metrics"]`, or nothing."""
    reward_components: dict[str, float] = field(default_factory=dict)
    """`info["rewards"]`, or nothing; the sum is `reward`."""


def normalize_observation(observation: Any) -> list[Message]:
    """An observation as a list of chat messages, copied so that the environment cannot change them later.

    Raises:
        EnvError: it is not text, a message, or a non-empty list of messages.
    """
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    if isinstance(observation, Mapping):
        return [_message(observation, "observation")]
    if isinstance(observation, list | tuple):
        if not observation:
            raise EnvError("the observation is an empty list; expected at least one chat message")
        return [_message(item, f"observation[{index}]") for index, item in enumerate(observation)]
    raise EnvError(
        f"the observation is {_describe(observation)}; expected text (one user message), a chat message such as "
        '{"role": "user", "content": "..."}, or a list of them'
    )


def parse_reset(result: Any) -> list[Message]:
    """The first messages out of what `reset` returned. Raises EnvError when it breaks the contract."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise EnvError(f"reset returned {_describe(result)}; expected a tuple (observation, info)")
    observation, info = result
    if not isinstance(info, Mapping):
        raise EnvError(f"reset returned {_describe(info)} as info; expected a dict")
    return normalize_observation(observation)


def parse_step(result: Any) -> StepResult:
    """What `step` returned, checked. Raises EnvError when it breaks the contract."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise EnvError(
            f"step returned {_describe(result)}; expected a tuple (observation, reward, terminated, truncated, info)"
        )
    observation, reward, terminated, truncated, info = result
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            raise EnvError(f"step returned {_describe(flag)} as {name}; expected True or False")
    if not isinstance(info, Mapping):
        raise EnvError(f"step returned {_describe(info)} as info; expected a dict")
    checked = _finite(reward, "reward")
    components = _numbers(info.get("rewards", {}), "rewards")
    if components and (problem := components_problem(components, checked)):
        raise EnvError(f'step returned info["rewards"] {problem}')
    ended = bool(terminated or truncated)
    empty = observation is None or (isinstance(observation, list | tuple) and not observation)
    return StepResult(
        messages=[] if ended and empty else normalize_observation(observation),
        reward=checked,
        terminated=bool(terminated),
        truncated=bool(truncated),
        metrics=_numbers(info.get("metrics", {}), "metrics"),
        reward_components=components,
    )


def components_problem(components: Mapping[str, float], reward: float) -> str:
    """How the components of a reward miss it, or nothing: they must sum to it, up to rounding."""
    total = math.fsum(components.values())
    if abs(total - reward) <= _SUM_TOLERANCE * max(1.0, abs(reward)):
        return ""
    return f"{dict(components)}, whose sum is {total:g}, with a reward of {reward:g}; expected the reward as their sum"


def find_env(env_id: str) -> Callable[..., Any]:
    """What makes the environment of an id, or of `module:Class` (the current directory counts).

    An id is one that is registered with Gymnasium, or an entry point `raygym.envs` of an installed package.

    Raises:
        EnvError: there is no such environment.
    """
    registered = env_id
    if ":" in env_id:
        module, _, registered = env_id.partition(":")
        imported = _import(env_id, module)
        if (creator := getattr(imported, registered, None)) is not None:
            return creator  # type: ignore[no-any-return]
        if registered not in gymnasium.registry:
            raise EnvError(
                f"envs[].id: {env_id!r}: module {module!r} has no {registered!r}"
                f"{_nearest(registered, _classes(imported))}"
            )
    elif env_id not in gymnasium.registry:
        return _installed(env_id)
    return partial(gymnasium.make, registered, disable_env_checker=True)


def make_env(env_id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make an environment from an id or from `module:Class`; see `find_env`.

    Raises:
        EnvError: the id is unknown, the kwargs are refused by the constructor, or it is no `gymnasium.Env`.
    """
    creator = find_env(env_id)
    try:
        env = creator(**kwargs)
    except ImportError as error:
        raise EnvError(f"envs[].id: {env_id!r} cannot be made: {error}") from error
    except (TypeError, ValueError) as error:
        raise EnvError(f"envs[].kwargs: {env_id} refused {dict(kwargs)}: {error}") from error
    if not isinstance(env, gymnasium.Env):
        raise EnvError(
            f"envs[].id: {env_id!r} made {_describe(env)}; expected a gymnasium.Env (subclass raygym.ChatEnv)"
        )
    return _without_order_enforcing(env, env_id)


def _without_order_enforcing(env: gymnasium.Env[Any, Any], env_id: str) -> gymnasium.Env[Any, Any]:
    # gymnasium.make adds it by itself, and it hides `tools`. Other wrappers were asked for at registration.
    if isinstance(env, gymnasium.wrappers.OrderEnforcing):
        env = env.env
    inner = env.unwrapped
    if env is not inner and (inspect.iscoroutinefunction(inner.step) or inspect.iscoroutinefunction(inner.reset)):
        raise EnvError(
            f"envs[].id: {env_id!r} is asynchronous but registered with a Gymnasium wrapper ({type(env).__name__}), "
            "which cannot await it; register it without wrappers and bound its length by rollout.max_turns"
        )
    return env


def __getattr__(name: str) -> Any:
    # It plays episodes, and what plays them imports this module.
    if name == "check_env":
        return importlib.import_module("raygym.check_env").check_env
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def env_tools(env: gymnasium.Env[Any, Any]) -> list[dict[str, Any]]:
    """The environment's OpenAI tool schemas; empty when it declares none."""
    return list(getattr(env.unwrapped, "tools", ()))


def _installed(env_id: str) -> Callable[..., Any]:
    try:
        creator = installed_env(env_id)
    except ImportError as error:
        raise EnvError(f"envs[].id: {env_id!r}: {error}") from error
    if creator is None:
        others = installed_env_ids()
        known = [*sorted(key for key in gymnasium.registry if key.startswith("raygym/")), *others]
        raise EnvError(
            f"envs[].id: {env_id!r} is not registered{_nearest(env_id, [*gymnasium.registry, *others])}; expected one "
            f"of {', '.join(known)}, another registered Gymnasium id, or module:Class"
        )
    return creator


def _import(env_id: str, module: str) -> ModuleType:
    # Console scripts do not have the current directory on the path. Last, so that it hides no installed module.
    if module not in sys.modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvError(
            f"envs[].id: {env_id!r}: module {module!r} cannot be imported ({error}); expected a module of the current "
            "directory or an installed one"
        ) from error


def _classes(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, gymnasium.Env)]


def _nearest(name: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise EnvError(f"the {where} is {_describe(item)}; expected a chat message with role and content")
    role = item.get("role")
    if role not in _ROLES:
        raise EnvError(f"the {where} has role {role!r}; expected one of {', '.join(_ROLES)}")
    message = copy.deepcopy(dict(item))
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = _joined_parts(content, where)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise EnvError(f"the {where} has {_describe(content)} as content; expected text")
    return message


def _joined_parts(parts: list[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise EnvError(f'the {where} has the content part {part!r}; expected {{"type": "text", "text": "..."}}')
    return "".join(part["text"] for part in parts)


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, numbers.Real | np.bool_):
        raise EnvError(f"step returned {_describe(value)} as {name}; expected a number")
    if not math.isfinite(value):
        raise EnvError(f"step returned {name} {value}; expected a finite number")
    return float(value)


def _numbers(values: Any, name: str) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise EnvError(f'step returned {_describe(values)} as info["{name}"]; expected a dict of numbers')
    return {str(key): _finite(value, f'info["{name}"][{key!r}]') for key, value in values.items()}


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
