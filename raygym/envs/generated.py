"""What environments with generated tasks share: the held-out split, and the strict answer format."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from typing import Any

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
VALIDATION_SHARE = 0.2
"""Share of a task space that is held out for validation."""


def held_out(*task: int | str) -> bool:
    """Whether a task belongs to validation: a hash of the task alone decides, so both splits never share one."""
    digest = hashlib.blake2b(repr(task).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64


def in_split(options: dict[str, Any] | None, *task: int | str) -> bool:
    """Whether a task may be used under `env.reset(options=...)`; without a split it is training.

    Raises:
        ValueError: `options["split"]` is neither `train` nor `validation`.
    """
    return held_out(*task) is is_validation(options)


def is_validation(options: dict[str, Any] | None) -> bool:
    """Whether `env.reset(options=...)` asks for the split `validation`; without a split it is training.

    Raises:
        ValueError: `options["split"]` is neither `train` nor `validation`.
    """
    split = (options or {}).get("split", "train")
    if split not in ("train", "validation"):
        raise ValueError(f"options['split'] is {split!r}; expected 'train' or 'validation'")
    return bool(split == "validation")


def split_seed(seed: int, options: dict[str, Any] | None) -> int:
    """The seed for a generator that is not raygym's: even in training, odd in validation, so no seed is in both.

    Below 2^32 for the seeds of a run, which are below 2^31. Two seeds can still give the same task where there are few.
    """
    return 2 * seed + is_validation(options)


def chosen(key: str, choices: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """What a constructor was told to draw from.

    Raises:
        ValueError: nothing, or something unknown, or text instead of a list; the message begins with `key`.
    """
    if isinstance(choices, str) or not choices:
        raise ValueError(f"{key}: {choices!r}; expected a list with some of {', '.join(known)}")
    if unknown := [choice for choice in choices if choice not in known]:
        raise ValueError(f"{key}: {unknown[0]!r} is unknown; expected some of {', '.join(known)}")
    return tuple(choices)


def whole_number(text: str) -> int | None:
    """The integer that a reply consists of, or None when it is anything more (one final full stop is forgiven)."""
    stripped = text.strip().removesuffix(".")
    return int(stripped) if _WHOLE_NUMBER.fullmatch(stripped) else None
