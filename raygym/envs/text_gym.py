"""Any Gymnasium environment that can be read and played as text: observations and actions pass through small functions.

    envs:
      - {id: raygym/TextGym-v0, kwargs: {env: FrozenLake-v1, params: {is_slippery: false}}}
      - {id: raygym/TextGym-v0, name: lakes, kwargs: {env: FrozenLake-v1, per_task: "raygym.envs.toy_text:random_lake"}}
      - {id: raygym/TextGym-v0, name: cards, kwargs: {env: Blackjack-v1}}
      - {id: raygym/TextGym-v0, name: taxi, kwargs: {env: Taxi-v4, observe: "my_taxi:observe",
                                                     actions: [south, north, east, west, pick up, drop off]}}

FrozenLake and Blackjack read well without further words. For others, `observe` names a function from (observation,
environment) to text, and `act` one from (reply, environment) to an action that raises ValueError with what is wrong,
for the policy to read. Without `act`, discrete actions are played by number, or by `actions`, a list of names in the
order of the numbers, of which exactly one must occur in the reply. Text spaces pass through.

Data: the environment's own, from the task's seed: training resets it with even seeds and validation with odd ones. What
the environment does not draw from its seed is the same in both: FrozenLake's map is fixed unless `per_task` names a
function from the seed to more of Gymnasium's parameters.

Reward: the environment's own at each step. An unreadable reply plays no action and costs a turn and
`unreadable_reward`; the policy is told what would be readable, and `max_unreadable` such replies in a row end the
episode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium

from raygym.env import ChatEnv
from raygym.envs.generated import split_seed, whole_number
from raygym.envs.hooks import load_function
from raygym.envs.toy_text import READINGS, Reading
from raygym.types import Message

_UNKNOWN = Reading("", (), "")


class TextGym(ChatEnv):
    """A Gymnasium environment in a conversation."""

    def __init__(
        self,
        env: str,
        params: dict[str, Any] | None = None,
        observe: str | None = None,
        actions: Sequence[str] | None = None,
        act: str | None = None,
        instruction: str | None = None,
        per_task: str | None = None,
        unreadable_reward: float = 0.0,
        max_unreadable: int = 3,
    ) -> None:
        """Make the environment once; it is used for all episodes unless `per_task` is given.

        Args:
            env: a Gymnasium id, such as FrozenLake-v1.
            params: what `gymnasium.make` gets.
            observe: `module:function` from (observation, environment) to text.
            actions: names of the discrete actions, in the order of their numbers.
            act: `module:function` from (reply, environment) to an action; instead of `actions`.
            instruction: what is told before the first observation; the possible actions are told after it.
            per_task: `module:function` from the task's seed to more of what `gymnasium.make` gets.
            unreadable_reward: for a reply that names no action.
            max_unreadable: so many of those in a row end the episode.

        Raises:
            ValueError: the environment cannot be made, or an argument does not fit it.
        """
        if max_unreadable < 1:
            raise ValueError(f"max_unreadable: {max_unreadable}; expected at least 1")
        if act is not None and actions is not None:
            raise ValueError("act, actions: expected one of them, found both")
        self._id, self._params = env, dict(params or {})
        self._per_task = load_function("per_task", per_task) if per_task is not None else None
        self._env = self._make({} if self._per_task is None else self._per_task(0))
        spec = self._env.spec
        reading = READINGS.get(spec.name, _UNKNOWN) if spec else _UNKNOWN
        path = observe or reading.observe
        self._observe = load_function("observe", path) if path else _plain
        names = reading.actions if actions is None else actions
        self._act, choices = _player(self._env.action_space, names, act)
        told = reading.instruction if instruction is None else instruction
        self._instruction = " ".join(part for part in (told, choices) if part)
        self._unreadable_reward, self._max_unreadable = float(unreadable_reward), max_unreadable
        self._unreadable = self._unreadable_in_all = self._steps = 0
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode: the rules, the possible actions and the first observation."""
        super().reset(seed=seed)
        number = split_seed(int(self.np_random.integers(2**31)) if seed is None else seed, options)
        if self._per_task is not None:
            self._env.close()
            self._env = self._make(self._per_task(number))
        observation, info = self._env.reset(seed=number)
        self._unreadable = self._unreadable_in_all = self._steps = 0
        self._return = 0.0
        text = self._observe(observation, self._env)
        return "\n\n".join(part for part in (self._instruction, text) if part), info

    def step(self, action: Message) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play the action that the reply names."""
        self._steps += 1
        try:
            chosen = self._act(action["content"] or "", self._env)
        except ValueError as problem:
            return self._not_readable(str(problem))
        self._unreadable = 0
        observation, reward, terminated, truncated, _ = self._env.step(chosen)
        text = self._observe(observation, self._env)
        return text, self._counted(float(reward)), bool(terminated), bool(truncated), self._info()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _make(self, more: dict[str, Any]) -> gymnasium.Env[Any, Any]:
        try:
            return gymnasium.make(self._id, disable_env_checker=True, **{**self._params, **more})
        except (gymnasium.error.Error, TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"env, params: {self._id} with {self._params} cannot be made: {error}") from error

    def _not_readable(self, problem: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._unreadable += 1
        self._unreadable_in_all += 1
        ended = self._unreadable >= self._max_unreadable
        return problem, self._counted(self._unreadable_reward), ended, False, self._info()

    def _counted(self, reward: float) -> float:
        self._return += reward
        return reward

    def _info(self) -> dict[str, Any]:
        readable = 1 - self._unreadable_in_all / self._steps
        return {"metrics": {"return": self._return, "steps": float(self._steps), "format": readable}}


Player = Callable[[str, gymnasium.Env[Any, Any]], Any]


def _plain(observation: Any, env: gymnasium.Env[Any, Any]) -> str:
    return observation if isinstance(observation, str) else f"Observation: {observation}"


def _player(space: gymnasium.Space[Any], names: Sequence[str], act: str | None) -> tuple[Player, str]:
    """From a reply to an action, and the sentence that tells the policy what is possible."""
    if act is not None:
        return load_function("act", act), ""
    if isinstance(space, gymnasium.spaces.Text):
        return lambda reply, env: _in_space(reply.strip(), space), ""
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise ValueError(
            f"act: actions are {space}; expected `act`, a module:function from (reply, environment) to one"
        )
    first, count = int(space.start), int(space.n)
    if isinstance(names, str) or (names and len(names) != count):
        raise ValueError(f"actions: {names!r}; expected a list of {count} names, in the order of the actions' numbers")
    if not names:
        return _Numbers(
            first, count
        ), f"Answer with the number of an action, from {first} to {first + count - 1}, only."
    if len({name.casefold() for name in names}) != count:
        raise ValueError(f"actions: {list(names)!r}; expected names that differ")
    return _Names(names, first), f"Answer with one of: {', '.join(names)}."


def _in_space(action: Any, space: gymnasium.Space[Any]) -> Any:
    if not space.contains(action):
        raise ValueError(f"{action!r} is no possible action.")
    return action


class _Numbers:
    def __init__(self, first: int, count: int) -> None:
        self._first, self._last = first, first + count - 1

    def __call__(self, reply: str, env: gymnasium.Env[Any, Any]) -> int:
        number = whole_number(reply)
        if number is None or not self._first <= number <= self._last:
            raise ValueError(f"Answer with a number from {self._first} to {self._last}, and nothing else.")
        return number


class _Names:
    def __init__(self, names: Sequence[str], first: int) -> None:
        self._numbers = {name.casefold(): first + index for index, name in enumerate(names)}
        # Longer names first, so that "turn left" is not read as "left".
        longest = sorted(self._numbers, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)")
        self._hint = f"Answer with exactly one of: {', '.join(names)}."

    def __call__(self, reply: str, env: gymnasium.Env[Any, Any]) -> int:
        found = set(self._pattern.findall(reply.casefold()))
        if len(found) != 1:
            raise ValueError(self._hint)
        return self._numbers[found.pop()]
