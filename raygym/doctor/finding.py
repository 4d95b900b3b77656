"""What a check says, and how checks are run so that one that fails hides nothing of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """A run works, but slower, or not in every case."""
    PROBLEM = "problem"
    """A run does not start, or will fail."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about one thing."""

    name: str
    level: Level
    found: str
    """What is there."""
    advice: str = ""
    """What to do; empty where nothing is to be done."""


Check = Callable[[], Iterable[Finding]]


def ok(name: str, found: str) -> Finding:
    """Nothing is to be done."""
    return Finding(name, Level.OK, found)


def warning(name: str, found: str, advice: str) -> Finding:
    """It works, but."""
    return Finding(name, Level.WARNING, found, advice)


def problem(name: str, found: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(name, Level.PROBLEM, found, advice)


def examine(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Every finding of all checks, as they come. A check that raises is a warning of its name."""
    for name, check in checks.items():
        try:
            yield from check()
        except ImportError as error:
            yield warning(name, f"could not be looked at ({error})", "install the packages first, as told below")
        except Exception as error:  # a doctor's own failure must not hide what the others find
            text = " ".join(str(error).split())
            yield warning(name, f"could not be looked at ({type(error).__name__}: {text})", "look at it yourself")
