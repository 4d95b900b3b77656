"""Which of an episode's messages belong to which turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def turn_of(messages: Sequence[Mapping[str, Any]], turns: int) -> list[int | None]:
    """For each message the number of its turn. A prompt may have examples of replies, so turns are counted from the
    end: the last assistant message is the last turn's."""
    replies = sum(message.get("role") == "assistant" for message in messages)
    number = turns - replies - 1
    found: list[int | None] = []
    for message in messages:
        number += message.get("role") == "assistant"
        found.append(number if 0 <= number < turns else None)
    return found
