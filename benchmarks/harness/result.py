"""The one schema of what a benchmark has measured: the last line that it prints, and the files that are kept of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

SCHEMA_VERSION = 1
SPREAD = "_spread"
"""The end of a name in `metrics` that is no metric of its own."""


class ResultError(ValueError):
    """What was to be a result is none. The text says where it is, what is wrong with it and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Machine(_Part):
    """Where it was measured."""

    cpu: str
    cores: Annotated[int, Field(ge=1)]
    """That the benchmark may use."""
    memory_gib: FiniteFloat
    python: str
    packages: dict[str, str]
    """Versions of torch, ray, vllm and deepspeed, those that are installed."""
    load_at_start: FiniteFloat
    """Processes that wanted a core in the minute before: above 0.5 or so, others have slowed it down."""


class Commit(_Part):
    """What was measured."""

    id: str
    dirty: bool
    """Whether tracked files differed from it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that was measured, at least once."""

    median: float
    spread: float
    """The largest of the samples minus the smallest; of one sample it is 0, and says nothing."""
    samples: tuple[float, ...]
    unit: str | None
    """`ms`, `tokens/s`; "1" of a ratio; None where the name does not say."""


class Result(_Part):
    """One run of one benchmark."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    command: str
    config: Any = None
    """What was measured with, for people; runs of other configs cannot be compared."""
    machine: Machine
    started: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    """In UTC."""
    seconds: FiniteFloat
    """From the start of the process."""
    commit: Commit | None
    calibration: dict[str, FiniteFloat]
    """What this machine does at its best: medians, and spreads where there are any (see `calibrate.py`)."""
    repetitions: Annotated[int, Field(ge=1)]
    """Samples of the metric that has most."""
    metrics: dict[str, FiniteFloat]
    """Of each metric its median, and as `<metric>_spread` its spread."""
    samples: dict[str, Annotated[list[FiniteFloat], Field(min_length=1)]]
    units: dict[str, str]
    details: dict[str, Any] = {}
    """What else this benchmark has to say."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.samples:
            raise ValueError("samples: has no metric; expected one at least")
        expected = summary(self.samples)
        for key in sorted(expected.keys() | self.metrics.keys()):
            found, wanted = self.metrics.get(key), expected.get(key)
            if found != wanted:
                raise ValueError(f"metrics.{key}: is {found}; by the samples it is {wanted}")
        return self

    @property
    def quick(self) -> bool:
        """Whether it was run with fewer and smaller measurements."""
        return "--quick" in self.command.split()

    def metric(self, name: str) -> Metric | None:
        """One of the metrics; None if it was not measured."""
        if name not in self.samples:
            return None
        values = tuple(self.samples[name])
        return Metric(self.metrics[name], self.metrics[name + SPREAD], values, self.units.get(name))


class Skipped(_Part):
    """What a benchmark prints that has something missing here, and succeeds all the same."""

    name: str
    skipped: Annotated[str, Field(min_length=1)]
    """Why, and what to do about it."""
    metrics: dict[str, FiniteFloat] = {}


def summary(samples: dict[str, list[float]]) -> dict[str, float]:
    """`Result.metrics` of samples."""
    medians = {key: rounded(median(values)) for key, values in samples.items()}
    return medians | {key + SPREAD: rounded(max(values) - min(values)) for key, values in samples.items()}


def rounded(value: float) -> float:
    """To four decimals, but what is small to three digits, so that a difference of 1e-7 is not shown as none."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.3g}")


def parse_result(text: str, where: str) -> Result | Skipped:
    """One JSON object, as a benchmark prints it.

    Args:
        text: the object.
        where: what it was found in, for the error.

    Raises:
        ResultError: it is no result of this schema.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ResultError(f"{where}: is no JSON ({error}): {_shown(text)}") from None
    if not isinstance(found, dict):
        raise ResultError(f"{where}: is no JSON object: {_shown(text)}")
    model: type[Result | Skipped] = Skipped if "skipped" in found else Result
    if model is Result and found.get("schema_version") != SCHEMA_VERSION:
        raise ResultError(
            f"{where}: schema_version is {found.get('schema_version')!r}; expected {SCHEMA_VERSION}. Another version "
            "of raygym has written it: run the benchmark again"
        )
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise ResultError(f"{where}: {f'{key}: ' if key else ''}{said}; run the benchmark again") from None


def read_result(path: Path) -> Result:
    """A file that the suite has written.

    Raises:
        ResultError: it cannot be read, or is no result of this schema.
    """
    return _measured(_text(path), path)


def printed_result(path: Path) -> Result:
    """A file of what a benchmark printed, whose last line is the result; or one that the suite has written.

    Raises:
        ResultError: it cannot be read, or there is no result of this schema in it.
    """
    text = _text(path).strip()
    last = text.rpartition("\n")[2]
    return _measured(last if last.startswith("{") else text, path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: cannot be read: {error}") from None


def _measured(text: str, path: Path) -> Result:
    found = parse_result(text, str(path))
    if isinstance(found, Skipped):
        raise ResultError(f"{path}: is of a benchmark that was skipped ({found.skipped}); expected what it measured")
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
