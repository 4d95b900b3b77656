"""Families of small programming tasks: a text, and what the asked function must return for given arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

Draw = Callable[[int, int], int]
"""A whole number between two bounds, both included."""


@dataclass(frozen=True, slots=True)
class Family:
    """Tasks that differ in their parameters only."""

    signature: str
    text: str
    """What to write, with the parameters in braces."""
    parameters: Callable[[Draw], dict[str, int]]
    arguments: Callable[[Draw], tuple[Any, ...]]
    """One random input."""
    solve: Callable[..., Any]
    """The right result of the arguments, given the parameters by name."""

    @property
    def function(self) -> str:
        """The name of the asked function."""
        return self.signature.partition("(")[0]


@dataclass(frozen=True, slots=True)
class CodeTask:
    """One task: what is asked and N tests of it."""

    family: str
    parameters: dict[str, int]
    function: str
    text: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]
    """N pairs of arguments and result. All are JSON values."""


def draw_task(name: str, parameters: dict[str, int], rng: np.random.Generator, tests: int) -> CodeTask | None:
    """A task of a family with `tests` random tests, no two with the same arguments.

    No result is that of more than half of the tests, so that no constant passes for a solution. None where the
    parameters give too few different ones.
    """
    family = FAMILIES[name]
    draw = drawing(rng)
    chosen: dict[str, tuple[tuple[Any, ...], Any]] = {}
    counts: Counter[str] = Counter()
    for _ in range(40 * tests):
        arguments = family.arguments(draw)
        result = family.solve(*arguments, **parameters)
        if repr(arguments) in chosen or counts[repr(result)] >= max(1, tests // 2):
            continue
        chosen[repr(arguments)] = arguments, result
        counts[repr(result)] += 1
        if len(chosen) == tests:
            break
    else:
        return None
    text = f"Write a Python function `{family.signature}`. {family.text.format(**parameters)}"
    return CodeTask(name, parameters, family.function, text, tuple(chosen.values()))


def drawing(rng: np.random.Generator) -> Draw:
    """A `Draw` from a generator."""
    return lambda low, high: int(rng.integers(low, high + 1))


def agrees(result: Any, expected: Any) -> bool:
    """Whether a result that came through JSON is the expected one; True is not 1, and 2.0 is not 2."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(result, list)
            and len(result) == len(expected)
            and all(agrees(one, other) for one, other in zip(result, expected, strict=True))
        )
    return type(result) is type(expected) and result == expected


def _numbers(draw: Draw, low: int = -50, high: int = 50) -> list[int]:
    return [draw(low, high) for _ in range(draw(1, 12))]


def _word(draw: Draw, letters: str = "abcdefgh", longest: int = 12) -> str:
    return "".join(letters[draw(0, len(letters) - 1)] for _ in range(draw(1, longest)))


def _sentence(draw: Draw) -> str:
    return " ".join(_word(draw, "aeilmnorst", 9) for _ in range(draw(1, 8)))


def _shifted(text: str, k: int) -> str:
    return "".join(chr((ord(c) - 97 + k) % 26 + 97) if "a" <= c <= "z" else c for c in text)


def _in_base(n: int, base: int) -> str:
    digits = ""
    while n:
        digits = str(n % base) + digits
        n //= base
    return digits or "0"


def _merged(spans: Sequence[Sequence[int]], gap: int) -> list[list[int]]:
    merged: list[list[int]] = []
    for start, end in sorted(map(tuple, spans)):
        if merged and start <= merged[-1][1] + gap:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def _spans(draw: Draw) -> list[list[int]]:
    starts = [draw(0, 60) for _ in range(draw(1, 7))]
    return [[start, start + draw(0, 8)] for start in starts]


def _steps(n: int, a: int, b: int, limit: int) -> int:
    steps = 0
    while n != 1 and steps < limit:
        n = n // 2 if n % 2 == 0 else a * n + b
        steps += 1
    return steps


FAMILIES: dict[str, Family] = {
    "select": Family(
        "select(numbers)",
        "It takes a list of whole numbers and returns the list of those that leave the remainder {r} when divided by "
        "{k} (as Python's % does) and are greater than {low}, in their order.",
        lambda draw: (lambda k: {"k": k, "r": draw(0, k - 1), "low": draw(-20, 20)})(draw(2, 4)),
        lambda draw: (_numbers(draw),),
        lambda numbers, k, r, low: [n for n in numbers if n % k == r and n > low],
    ),
    "weigh": Family(
        "weigh(numbers)",
        "It takes a list of whole numbers and returns the sum of {a} times every number at an even index (the first "
        "one has index 0) and {b} times every number at an odd index.",
        lambda draw: {"a": draw(-9, 9), "b": draw(-9, 9)},
        lambda draw: (_numbers(draw),),
        lambda numbers, a, b: a * sum(numbers[::2]) + b * sum(numbers[1::2]),
    ),
    "shift": Family(
        "shift(text)",
        "It takes a text and returns it with each lowercase letter a to z moved {k} places further in the alphabet, "
        "going on at a after z. All other characters stay as they are. The first {n} characters stay as they are, too.",
        lambda draw: {"k": draw(1, 25), "n": draw(0, 3)},
        lambda draw: (_word(draw, "abcxyz AZ-09", 14),),
        lambda text, k, n: text[:n] + _shifted(text[n:], k),
    ),
    "shorten": Family(
        "shorten(text)",
        "It takes a text and returns it with each run of {k} or more equal characters replaced by the character, "
        "followed by the number of times that it was repeated, plus {n}. Shorter runs stay as they are.",
        lambda draw: {"k": draw(2, 5), "n": draw(0, 9)},
        lambda draw: ("".join(c * draw(1, 6) for c in _word(draw, "abc", 6)),),
        lambda text, k, n: "".join(
            c + str(size + n) if size >= k else c * size
            for c, size in ((c, len(list(run))) for c, run in groupby(text))
        ),
    ),
    "digits": Family(
        "digits(n)",
        "It takes a whole number n of at least 0 and returns the digits of n times {k} in base {base}, as a text "
        'without leading zeros ("0" for zero).',
        lambda draw: {"base": draw(2, 9), "k": draw(1, 20)},
        lambda draw: (draw(0, 5000),),
        lambda n, base, k: _in_base(n * k, base),
    ),
    "merge": Family(
        "merge(spans)",
        "It takes a list of [start, end] pairs of whole numbers and returns the merged pairs, sorted by their start: "
        "two pairs become one when one begins at most {gap} after the other's end. Pairs shorter than {least} "
        "(end minus start, after merging) are left out.",
        lambda draw: {"gap": draw(0, 9), "least": draw(0, 6)},
        lambda draw: (_spans(draw),),
        lambda spans, gap, least: [span for span in _merged(spans, gap) if span[1] - span[0] >= least],
    ),
    "top": Family(
        "top(words)",
        "It takes a text of words separated by single spaces and returns the list of the {k} longest different words "
        "that have at least {least} letters, longest first, equally long ones in alphabetical order. If there are "
        "fewer, it returns all of them.",
        lambda draw: {"k": draw(1, 6), "least": draw(1, 6)},
        lambda draw: (_sentence(draw),),
        lambda words, k, least: sorted({w for w in words.split() if len(w) >= least}, key=lambda w: (-len(w), w))[:k],
    ),
    "steps": Family(
        "steps(n)",
        "It takes a whole number n of at least 1. As long as n is not 1, n is halved if it is even, and replaced by "
        "{a} * n + {b} if it is odd. It returns the number of these steps, but {limit} if n has not become 1 by then.",
        lambda draw: {"a": 2 * draw(0, 1) + 1, "b": 2 * draw(0, 9) + 1, "limit": draw(20, 60)},
        lambda draw: (draw(1, 3000),),
        lambda n, a, b, limit: _steps(n, a, b, limit),
    ),
}
