"""The goals that the project's issues state, from `benchmarks/goals.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from harness.result import ResultError
from harness.units import RATIO, is_ratio, unit_of
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

GOALS_FILE = Path(__file__).resolve().parent.parent / "goals.yaml"


class Goal(BaseModel):
    """One metric, and what it should be."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    benchmark: str
    metric: str
    says: str
    """What it is, for people."""
    issue: int
    """That states the goal, or asks for the figure."""
    at_least: FiniteFloat | None = None
    above: FiniteFloat | None = None
    at_most: FiniteFloat | None = None
    """One of the three at most; none: the issue asks only that the figure is reported."""
    better: Literal["higher", "lower"] | None = None
    """Without a goal: which way is up, if any. With one, the goal says it."""
    simulated: bool = False
    """Whether the engine was."""
    quick_differs: str = ""
    """Why a quick run does not measure what the goal means; empty where it does."""
    noise: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Part of the value by which two runs may differ (see `suite.noise`); default: 0.1 for ratios, nothing else."""
    readme: str = ""
    """Its words in the README's table, if it is there."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        given = [key for key in ("at_least", "above", "at_most") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.metric}: has {' and '.join(given)}; expected one of them, or none")
        if given and self.better is not None:
            raise ValueError(f"{self.metric}: has better and {given[0]}, which says it already; leave better out")
        return self

    @property
    def up(self) -> Literal["higher", "lower"] | None:
        """Which values are better."""
        if self.at_least is not None or self.above is not None:
            return "higher"
        return "lower" if self.at_most is not None else self.better

    @property
    def wanted(self) -> float | None:
        """The goal's value."""
        return next((v for v in (self.at_least, self.above, self.at_most) if v is not None), None)

    @property
    def said(self) -> str:
        """The goal, as in `at most 10 ms`; empty where there is none."""
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
        unit = unit_of(self.metric)
        behind = f" {unit}" if unit not in (None, RATIO) else ""
        return next((f"{word} {value:g}{behind}" for word, value in words.items() if value is not None), "")

    @property
    def floor(self) -> float | None:
        """The least part of the value that counts as noise; None: runs are not compared by this metric."""
        if self.noise is not None:
            return self.noise
        return 0.1 if is_ratio(self.metric) else None

    def met(self, value: float) -> bool | None:
        """Whether a value reaches the goal; None if there is none."""
        if self.at_least is not None:
            return value >= self.at_least
        if self.above is not None:
            return value > self.above
        return None if self.at_most is None else value <= self.at_most


_GOALS: TypeAdapter[list[Goal]] = TypeAdapter(list[Goal])


def load_goals(path: Path = GOALS_FILE) -> list[Goal]:
    """All of them, in the order of the table.

    Raises:
        ResultError: the file is none, or an entry of it says something that is no goal.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        goals = _GOALS.validate_python(found)
    except (OSError, yaml.YAMLError) as error:
        raise ResultError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        which, *key = first["loc"] or ("?",)
        said = first["msg"].removeprefix("Value error, ")
        raise ResultError(f"{path}: entry {which}: {'.'.join(map(str, key))} {said}".replace(":  ", ": ")) from None
    twice = {g.metric for g in goals if sum(h.metric == g.metric and h.benchmark == g.benchmark for h in goals) > 1}
    if twice:
        raise ResultError(f"{path}: {', '.join(sorted(twice))}: is there twice; expected one entry for each metric")
    return goals
