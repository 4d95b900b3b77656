"""The one family of raygym's errors that a program catches: `except raygym.RaygymError`."""

from __future__ import annotations


class RaygymError(Exception):
    """Base of what raygym raises for a person to read; its text says what was wrong and what to do."""


class RunFailed(RaygymError):
    """A run began and did not come to its end. The text is its cause, in one line or a few."""


class LearnerStateError(ValueError):
    """A saved state of the learners is not one of this policy. The text says how they differ."""
