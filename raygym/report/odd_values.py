"""What is made of values that a file has, and that raygym would not have written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from raygym.run_reading import is_number

_T = TypeVar("_T")
LARGEST = 1e300
"""What is beyond it counts as it, so that sums and differences of a run's numbers are finite."""
ODD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading such a value may raise."""


def finite(value: Any) -> float | None:
    """The value as a float between -1e300 and 1e300; None where it is no finite number."""
    return max(-LARGEST, min(LARGEST, float(value))) if is_number(value) else None


def or_noted(damaged: Callable[[str], None], source: Any, what: str, read: Callable[[], _T], otherwise: _T) -> _T:
    """One part of a report, and `otherwise` where an odd value is in its way: the rest is still a report.

    Args:
        damaged: is told of it.
        source: the file that has the value.
        what: is missing then, such as `the facts`.
        read: makes the part.
        otherwise: is shown instead.
    """
    try:
        return read()
    except ODD as error:
        problem = f"{type(error).__name__}: {error}"
        damaged(f"{source}: {what} cannot be shown, since a value is not as raygym writes it ({problem})")
        return otherwise
