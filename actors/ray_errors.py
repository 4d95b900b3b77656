"""Ray's errors in one line for a person."""

from __future__ import annotations

from ray.exceptions import RayTaskError

# Ray goes on with a list of all that can end a process.
_GUESSES = " Some common causes include:"


def cause(error: BaseException) -> str:
    """The one line that says why: the last line of what the innermost remote error says."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(_GUESSES)[0] if lines else type(error).__name__
