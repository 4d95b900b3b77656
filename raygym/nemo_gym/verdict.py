"""What a server's verdict on an episode means: a reward, a sample that must not count, or an answer that is wrong."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from raygym.env import EnvError, components_problem
from raygym.types import EpisodeFailure, FailureKind


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward that counts."""

    reward: float
    metrics: dict[str, float]
    """The verifier's own numbers, and `reward_components` as `reward/<name>`."""
    reward_components: dict[str, float] = field(default_factory=dict)
    """By name; the sum is `reward`. None where the verifier names none."""


def read_verdict(answer: Mapping[str, Any], known: Collection[str]) -> Verdict:
    """The verdict in the answer of `/verify` or `/run`.

    Args:
        answer: the JSON object.
        known: keys of the row, which the answer repeats; they are no metrics.

    Raises:
        EpisodeFailure: `masked`: the server says that the reward is no measurement.
        EnvError: there is no finite reward, or its components do not sum to it.
    """
    if answer.get("mask_sample"):
        why = ": ".join(str(answer[key]) for key in ("failure_kind", "failure_reason") if answer.get(key))
        raise EpisodeFailure(FailureKind.MASKED, f"mask_sample: {why or 'the server gives no reason'}")
    reward = _number(answer.get("reward"))
    if reward is None:
        raise EnvError(f"the verifier answered with reward {answer.get('reward')!r}; expected a finite number")
    components = _components(answer.get("reward_components"), reward)
    shown = {f"reward/{name}": value for name, value in components.items()}
    return Verdict(reward, {**numbers(answer, {*known, "reward", "mask_sample"}), **shown}, components)


def numbers(answer: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, float]:
    """The finite numbers and truth values of an answer, without the keys that are `known` to be something else."""
    found = {key: _number(value) for key, value in answer.items() if key not in known}
    return {key: value for key, value in found.items() if value is not None}


def _components(components: Any, reward: float) -> dict[str, float]:
    if components is None:
        return {}
    numbers = {key: _number(value) for key, value in components.items()} if isinstance(components, Mapping) else None
    if numbers is None or None in numbers.values():
        raise EnvError(f"the verifier answered with reward_components {components!r}; expected numbers by name")
    found = {str(key): value for key, value in numbers.items() if value is not None}
    if problem := components_problem(found, reward):
        raise EnvError(f"the verifier answered with reward_components {problem}")
    return found


def _number(value: Any) -> float | None:
    """A finite number or a truth value as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
