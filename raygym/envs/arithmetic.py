"""Arithmetic in one turn: which number is larger, sums, differences, products.

Data: operands drawn uniformly from [low, high] by the task's seed. A fifth of the operand pairs, chosen by a hash of
the pair, is held out for validation; for operations that do not mind the order, both orders are on the same side.

Reward: 1.0 for the right number alone; 0.2 for any other number alone (the format); 0.0 for everything else, also for
the right number inside a sentence. The question asks for the format.

Scores: a policy that always answers right scores 1.0. For `compare`, one that names either operand at random scores 0.6
and one that ignores the format 0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from raygym.env import ChatEnv
from raygym.envs.generated import held_out, in_split, whole_number
from raygym.types import Message

FORMAT_REWARD = 0.2
"""For a wrong answer that is a number and nothing else."""

_OPS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "compare": ("Which number is larger, {a} or {b}? Answer with the number only.", max),
    "add": ("What is {a} + {b}? Answer with the number only.", lambda a, b: a + b),
    "sub": ("What is {a} - {b}? Answer with the number only.", lambda a, b: a - b),
    "mul": ("What is {a} * {b}? Answer with the number only.", lambda a, b: a * b),
}
# From here on up a hash that left one split without any pair would be a once-in-a-trillion accident.
_WIDE_ENOUGH = 24


class Arithmetic(ChatEnv):
    """One question, one answer."""

    def __init__(self, low: int = 1, high: int = 99, ops: Sequence[str] = ("compare",)) -> None:
        """Draw operands from [low, high] and an operation from `ops` (compare, add, sub, mul).

        Raises:
            ValueError: an operation is unknown, or the range has no task for training or for validation.
        """
        if unknown := [op for op in ops if op not in _OPS]:
            raise ValueError(f"ops: {unknown[0]!r} is unknown; expected some of {', '.join(_OPS)}")
        if isinstance(ops, str) or not ops:
            raise ValueError(f"ops: {ops!r}; expected a list with some of {', '.join(_OPS)}")
        if lacking := [op for op in ops if high - low < _WIDE_ENOUGH and not _has_both_splits(op, low, high)]:
            raise ValueError(
                f"low, high: {low} to {high} leaves {lacking[0]} no tasks for one of the splits; use a wider range"
            )
        self._low, self._high, self._ops = low, high, tuple(ops)
        self._answer = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Ask one question of the split."""
        super().reset(seed=seed)
        op = self._ops[int(self.np_random.integers(len(self._ops)))]
        while True:
            a, b = (int(n) for n in self.np_random.integers(self._low, self._high + 1, size=2))
            if _allowed(op, a, b) and in_split(options, *_key(op, a, b)):
                break
        question, solve = _OPS[op]
        self._answer = solve(a, b)
        return question.format(a=a, b=b), {"op": op, "a": a, "b": b}

    def step(self, action: Message) -> tuple[None, float, bool, bool, dict[str, Any]]:
        """Grade the answer."""
        answer = whole_number(action["content"])
        right = answer == self._answer
        reward = 1.0 if right else FORMAT_REWARD if answer is not None else 0.0
        return None, reward, True, False, {"metrics": {"right": float(right), "format": float(answer is not None)}}


def _allowed(op: str, a: int, b: int) -> bool:
    return op != "compare" or a != b


def _key(op: str, a: int, b: int) -> tuple[str, int, int]:
    return (op, a, b) if op == "sub" else (op, min(a, b), max(a, b))


@cache
def _has_both_splits(op: str, low: int, high: int) -> bool:
    numbers = range(low, high + 1)
    return len({held_out(*_key(op, a, b)) for a in numbers for b in numbers if _allowed(op, a, b)}) == 2
