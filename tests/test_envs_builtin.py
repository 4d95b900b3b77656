"""The built-in environments: rewards, held-out tasks, and what scripted policies score."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable

import pytest

from raygym.envs.arithmetic import Arithmetic
from raygym.envs.generated import whole_number
from raygym.envs.number_guess import NumberGuess

GuessPolicy = Callable[[int, int, int, int, random.Random], object]
"""(first, last of the task; first, last still possible; randomness) -> reply."""

HALVING: GuessPolicy = lambda first, last, low, high, rng: (low + high) // 2  # noqa: E731
POSSIBLE: GuessPolicy = lambda first, last, low, high, rng: rng.randint(low, high)  # noqa: E731
IN_RANGE: GuessPolicy = lambda first, last, low, high, rng: rng.randint(first, last)  # noqa: E731
MIDDLE: GuessPolicy = lambda first, last, low, high, rng: (first + last) // 2  # noqa: E731
TALKING: GuessPolicy = lambda first, last, low, high, rng: f"I guess {low}"  # noqa: E731


def say(text: object) -> dict[str, str]:
    return {"role": "assistant", "content": str(text)}


def play(env: NumberGuess, policy: GuessPolicy, seed: int, split: str) -> float:
    _, info = env.reset(seed=seed, options={"split": split})
    first, last = info["first"], info["last"]
    low, high, rng = first, last, random.Random(seed)
    while True:
        observation, reward, terminated, _, _ = env.step(say(policy(first, last, low, high, rng)))
        if terminated:
            return reward
        assert reward == 0
        found = re.search(r"Pick a number from (\d+) to (\d+)\.$", observation)
        assert found, observation
        low, high = int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        (" 12.\n", 12),
        ("-3", -3),
        ("007", 7),
        ("", None),
        ("7..", None),
        ("7 or 8", None),
        ("٣", None),
        ("1.5", None),
    ],
)
def test_whole_number(text, number):
    assert whole_number(text) == number


class TestNumberGuess:
    @pytest.mark.parametrize("split", ["train", "validation"])
    @pytest.mark.parametrize(
        ("policy", "score"),
        [(HALVING, 0.78), (POSSIBLE, 0.65), (IN_RANGE, 0.42), (MIDDLE, 0.216), (TALKING, 0.0)],
        ids=["halving", "possible", "in-range", "middle", "talking"],
    )
    def test_documented_scores(self, policy, score, split):
        env = NumberGuess()
        rewards = [play(env, policy, seed, split) for seed in range(600)]
        assert sum(rewards) / len(rewards) == pytest.approx(score, abs=0.02)
        assert all(0 <= reward <= 1 for reward in rewards)

    def test_halving_always_solves_with_enough_attempts(self):
        env = NumberGuess(low=1, high=31, attempts=5)
        for seed in range(300):
            assert play(env, HALVING, seed, "train") >= 0.6

    def test_reward_of_each_attempt(self):
        env = NumberGuess(attempts=8)
        for attempt in range(1, 9):
            _, info = env.reset(seed=3)
            for _ in range(attempt - 1):
                env.step(say("what?"))
            _, reward, terminated, _, last = env.step(say(info["secret"]))
            assert terminated and reward == pytest.approx(max(0.5, 1 - 0.1 * (attempt - 1)))
            assert last["metrics"] == {"solved": 1.0, "attempts": attempt, "format": 1 / attempt}

    def test_unsolved_is_worth_half_of_the_bits_learned(self):
        env = NumberGuess(attempts=1)
        seed = next(s for s in range(99) if (i := env.reset(seed=s)[1])["secret"] > i["first"])
        _, info = env.reset(seed=seed)
        size = info["last"] - info["first"] + 1
        _, reward, terminated, _, _ = env.step(say(info["first"]))
        assert terminated and reward == pytest.approx(0.5 * math.log(size / (size - 1)) / math.log(size))

    def test_excluded_numbers_learn_nothing(self):
        env = NumberGuess(attempts=2)
        env.reset(seed=0)
        before = env.step(say(99))[0]
        assert before.startswith("99 is too high. Pick a number from")
        assert env.step(say(-5))[1] == 0.0

    def test_splits_share_no_range_and_both_vary(self):
        env = NumberGuess()
        seen = {
            split: {
                (info["first"], info["last"])
                for seed in range(800)
                for info in [env.reset(seed=seed, options={"split": split})[1]]
            }
            for split in ("train", "validation")
        }
        assert not seen["train"] & seen["validation"]
        assert (len(seen["train"]), len(seen["validation"])) == (54, 12)

    def test_prompt(self):
        observation, info = NumberGuess().reset(seed=5)
        assert observation == [
            {"role": "system", "content": "Answer with one number."},
            {
                "role": "user",
                "content": f"Pick a number from {info['first']} to {info['last']}. Answer with the number only.",
            },
        ]

    @pytest.mark.parametrize("kwargs", [{"low": 1, "high": 5}, {"attempts": 0}])
    def test_refuses(self, kwargs):
        with pytest.raises(ValueError, match="expected"):
            NumberGuess(**kwargs)

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="'test'"):
            NumberGuess().reset(seed=0, options={"split": "test"})


class TestArithmetic:
    @pytest.mark.parametrize(
        ("op", "solve"),
        [("compare", max), ("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul", lambda a, b: a * b)],
    )
    def test_rewards(self, op, solve):
        env = Arithmetic(ops=[op])
        for seed in range(50):
            question, info = env.reset(seed=seed)
            assert str(info["a"]) in question and str(info["b"]) in question
            right = solve(info["a"], info["b"])
            for reply, reward in ((f" {right}.\n", 1.0), (right + 1, 0.2), (f"It is {right}", 0.0), ("", 0.0)):
                env.reset(seed=seed)
                _, found, terminated, truncated, _ = env.step(say(reply))
                assert (found, terminated, truncated) == (reward, True, False)

    def test_compare_scores(self):
        env, rng = Arithmetic(), random.Random(0)
        rewards = []
        for seed in range(2000):
            _, info = env.reset(seed=seed)
            rewards.append(env.step(say(rng.choice([info["a"], info["b"]])))[1])
        assert sum(rewards) / len(rewards) == pytest.approx(0.6, abs=0.03)

    @pytest.mark.parametrize("op", ["compare", "add", "sub", "mul"])
    def test_splits_are_disjoint(self, op):
        env = Arithmetic(low=0, high=20, ops=[op])
        key = (lambda a, b: (a, b)) if op == "sub" else (lambda a, b: (min(a, b), max(a, b)))
        seen = {
            split: {
                key(info["a"], info["b"])
                for seed in range(600)
                for info in [env.reset(seed=seed, options={"split": split})[1]]
            }
            for split in ("train", "validation")
        }
        assert not seen["train"] & seen["validation"]
        share = len(seen["validation"]) / (len(seen["train"]) + len(seen["validation"]))
        assert 0.1 < share < 0.35

    def test_mixed_operations_and_compare_never_ties(self):
        env = Arithmetic(low=1, high=9, ops=["compare", "add"])
        infos = [env.reset(seed=seed)[1] for seed in range(200)]
        assert {info["op"] for info in infos} == {"compare", "add"}
        assert all(info["a"] != info["b"] for info in infos if info["op"] == "compare")

    @pytest.mark.parametrize("kwargs", [{"ops": ["root"]}, {"ops": []}, {"ops": "add"}, {"low": 1, "high": 2}])
    def test_refuses(self, kwargs):
        with pytest.raises(ValueError, match=r"ops:|low, high:"):
            Arithmetic(**kwargs)
