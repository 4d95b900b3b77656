"""Word problems with numbers that ask for a calculator, and the calculator as a tool.

Data: one of six families (bill, eggs, savings, tank, trip, expression) with numbers drawn by the task's seed, of about
`digits` digits. A fifth of the problems, chosen by a hash of family and numbers, is held out for validation. Answers
are exact: whole numbers, or rounded to two decimals where the question says so.

Tool: `calculate(expression)`; see `raygym.envs.expression` for what it knows. A wrong expression comes back as text.

Reward, given with the answer (a message without calls), in [0, 1]:
    1.0   the right number alone (thousands commas and trailing zeros are forgiven)
    0.3   for having had the calculator show the right number, if the answer is not right
  + 0.1   for an answer that is a number alone, if it is not right
After `max_turns` messages that called the calculator the episode is truncated and graded without an answer.

Scores, averaged over 2,000 seeds of each split (train / validation): a policy that calculates and copies 1.0 / 1.0; one
that calculates at random with two numbers of the question and copies 0.103 / 0.103; one that answers with a random
number of the question 0.1 / 0.1; one that calculates right and answers in a sentence 0.3 / 0.3; silence 0 / 0.
(`tests/test_envs_tools.py` checks them on fewer seeds.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from raygym.envs.expression import ExpressionError, evaluate, shown
from raygym.envs.generated import chosen, in_split
from raygym.tool_env import End, ToolEnv, tool
from raygym.types import Message

SHOWN_REWARD = 0.3
"""For the right number on the calculator, with a wrong answer."""
FORMAT_REWARD = 0.1
"""For a wrong answer that is a number and nothing else."""

_NUMBER = re.compile(r"-?([0-9]{1,30}|[0-9]{1,3}(,[0-9]{3}){1,9})(\.[0-9]{1,20})?")

# Each family: the question, how many numbers it has, and the expression that answers it.
_FAMILIES: dict[str, tuple[str, int, str]] = {
    "bill": (
        "A workshop orders {a} bolts at {b} cents each, {c} nuts at {d} cents each, and pays a delivery fee of {e} "
        "cents. How many cents does it pay in all?",
        5,
        "{a} * {b} + {c} * {d} + {e}",
    ),
    "eggs": (
        "A farm packs {a} eggs from one barn and {b} from another into boxes of {c}. How many eggs are left over when "
        "as many boxes as possible are full?",
        3,
        "({a} + {b}) % {c}",
    ),
    "savings": (
        "An account holds {a} euros and grows by {p} percent each year. How many euros does it hold after {n} years, "
        "rounded to two decimals?",
        1,
        "round({a} * (1 + {p} / 100) ** {n}, 2)",
    ),
    "tank": (
        "A tank holds {a} litres. Each of {n} pumps takes out {p} litres an hour, and a pipe adds {q} litres an hour. "
        "How many litres are in it after {m} hours? (A negative number says how many would be lacking.)",
        1,
        "{a} - {m} * ({n} * {p} - {q})",
    ),
    "trip": (
        "A lorry drives {a} metres, then {b} metres, then {c} metres. What is the mean length of these three drives in "
        "metres, rounded to two decimals?",
        3,
        "round(({a} + {b} + {c}) / 3, 2)",
    ),
    "expression": ("What is ({a} - {b}) * {c} + {d} * {e}?", 5, "({a} - {b}) * {c} + {d} * {e}"),
}
FAMILIES = tuple(_FAMILIES)


class Calculator(ToolEnv):
    """One question; any number of calculations; one answer."""

    def __init__(self, digits: int = 4, families: Sequence[str] = FAMILIES, max_turns: int = 6) -> None:
        """Draw numbers of about `digits` digits; `rollout.max_turns` should be larger than `max_turns` by one.

        Raises:
            ValueError: digits is outside of 2 to 12, a family is unknown, or max_turns < 1.
        """
        if not 2 <= digits <= 12:
            raise ValueError(f"digits: {digits}; expected 2 to 12")
        if max_turns < 1:
            raise ValueError(f"max_turns: {max_turns}; expected at least 1")
        self._digits, self._families, self._max_turns = digits, chosen("families", families, FAMILIES), max_turns
        self._right = Fraction(0)
        self._turns = self._calculations = self._errors = 0
        self._shown = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[Message], dict[str, Any]]:
        """Ask one question of the split."""
        super().reset(seed=seed)
        family = self._families[int(self.np_random.integers(len(self._families)))]
        while True:
            numbers = self._draw(family)
            if in_split(options, family, *numbers.values()):
                break
        question, _, formula = _FAMILIES[family]
        self._right = evaluate(formula.format(**numbers))
        self._turns = self._calculations = self._errors = 0
        self._shown = False
        system = "Use the tool calculate for every calculation. When you know the answer, reply with the number only."
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": question.format(**numbers)},
        ], {"family": family, "numbers": numbers}

    @tool
    def calculate(self, expression: str) -> str:
        """Calculate the value of an arithmetic expression, exactly.

        Args:
            expression: Numbers, + - * / // % **, parentheses, and the functions abs, ceil, floor, max, min, round
                and sqrt. For example: round((12.5 + 7) * 3, 1)
        """
        self._calculations += 1
        try:
            value = evaluate(expression)
        except ExpressionError as error:
            self._errors += 1
            return f"Error: {error}"
        self._shown |= value == self._right
        return shown(value)

    def after_calls(self) -> End | None:
        """Out of turns?"""
        self._turns += 1
        return self._end(None) if self._turns >= self._max_turns else None

    def answer(self, text: str) -> End:
        """Grade."""
        return self._end(text)

    def _end(self, text: str | None) -> End:
        stripped = (text or "").strip().removesuffix(".")
        is_number = bool(_NUMBER.fullmatch(stripped))
        right = is_number and Fraction(stripped.replace(",", "")) == self._right
        return End(
            1.0 if right else SHOWN_REWARD * self._shown + FORMAT_REWARD * is_number,
            truncated=text is None,
            metrics={
                "right": float(right),
                "calculations": float(self._calculations),
                "calculation_errors": float(self._errors),
            },
        )

    def _draw(self, family: str) -> dict[str, int]:
        whole: Callable[[int, int], int] = lambda low, high: int(self.np_random.integers(low, high + 1))  # noqa: E731
        low, high = 10 ** (self._digits - 1), 10**self._digits - 1
        numbers = {name: whole(low, high) for name in "abcde"[: _FAMILIES[family][1]]}
        if family == "eggs":
            numbers["c"] = whole(6, 48)
        if family == "savings":
            numbers |= {"p": whole(1, 12), "n": whole(2, 12)}
        if family == "tank":
            numbers |= {"n": whole(2, 9), "p": whole(11, 99), "q": whole(11, 199), "m": whole(3, 48)}
        return numbers
