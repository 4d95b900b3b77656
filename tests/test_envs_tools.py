"""The built-in environments with tools: rewards, held-out tasks, and what scripted policies score."""

from __future__ import annotations

import asyncio
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Awaitable, Callable
from fractions import Fraction
from typing import Any

import pytest
from tiers import only_long

from raygym import ToolEnv
from raygym.env import parse_step
from raygym.envs.calculator import FAMILIES as QUESTIONS
from raygym.envs.calculator import Calculator
from raygym.envs.code_tasks import FAMILIES as CODE_FAMILIES
from raygym.envs.code_tasks import agrees
from raygym.envs.expression import ExpressionError, evaluate, shown
from raygym.envs.python_code import PythonCode, program_of
from raygym.envs.warehouse import Warehouse
from raygym.sandbox.run import run_program

SPLITS = ("train", "validation")


class Player:
    """A scripted policy's hands: calls tools by name, answers, keeps the reward."""

    def __init__(self, env: ToolEnv, seed: int, split: str = "train") -> None:
        self.env = env
        observation, self.info = env.reset(seed=seed, options={"split": split})
        self.prompt = observation if isinstance(observation, str) else observation[-1]["content"]
        self.reward: float | None = None
        self.truncated = False
        self.metrics: dict[str, float] = {}

    async def call(self, name: str, **arguments: Any) -> Any:
        function = {"name": name, "arguments": json.dumps(arguments)}
        call = {"id": "call_0", "type": "function", "function": function}
        [message] = await self._step({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            return json.loads(message["content"])
        except ValueError:
            return message["content"]

    async def answer(self, text: object) -> float:
        await self._step({"role": "assistant", "content": str(text)})
        assert self.reward is not None
        return self.reward

    async def _step(self, action: dict[str, Any]) -> list[dict[str, Any]]:
        assert self.reward is None, "the episode is over"
        step = parse_step(await self.env.step(action))
        if step.terminated or step.truncated:
            self.reward, self.truncated, self.metrics = step.reward, step.truncated, step.metrics
        else:
            assert step.reward == 0
        return step.messages


Policy = Callable[[Player, random.Random], Awaitable[object]]


async def mean(make: Callable[[], ToolEnv], policy: Policy, seeds: range, split: str) -> float:
    async def one(seed: int) -> float:
        player = Player(make(), seed, split)
        await policy(player, random.Random(seed))
        assert player.reward is not None
        return player.reward

    rewards = await asyncio.gather(*map(one, seeds))
    return sum(rewards) / len(rewards)


class TestExpression:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1 + 2 * 3", "7"),
            ("(1 + 2) * -3", "-9"),
            ("0.1 + 0.2", "0.3"),
            ("1 / 3 * 3", "1"),
            ("10 / 4", "2.5"),
            ("1 / 7", "0.142857142857"),
            ("-7 // 2", "-4"),
            ("7 % 3", "1"),
            ("2 ** 10", "1024"),
            ("2 ** -2", "0.25"),
            ("0 ** 4", "0"),
            ("0 ** 0", "1"),
            ("(-1) ** 999999999", "-1"),
            ("1 ** 10 ** 9", "1"),
            ("sqrt(144)", "12"),
            ("sqrt(2)", "1.41421356237"),
            ("round(2.345, 2)", "2.35"),
            ("round(-2.5)", "-3"),
            ("max(1, 5, 2) - min(4, 3) + abs(-2) + floor(1.9) + ceil(1.1)", "7"),
            (" 12\n", "12"),
            ("123456789 * 987654321", "121932631112635269"),
            ("1 / 10 ** 9", "0.000000001"),
        ],
    )
    def test_values(self, text, value):
        assert shown(evaluate(text)) == value

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "no arithmetic"),
            ("1 +", "no arithmetic"),
            ("\x00", "no arithmetic"),
            ("10 / (5 - 5)", "division by zero"),
            ("0 ** -1", "division by zero"),
            ("9 ** 9 ** 9", "too large"),
            ("99999 ** 99999", "too large"),
            ("1e999", "too large"),
            ("(10 ** 400) ** 0.3", "too large"),
            ("round(1, 10 ** 9)", "places"),
            ("(-8) ** (1 / 3)", "no real number"),
            ("sqrt(-1)", "no real number"),
            ("2 ^ 3", "write ** for a power"),
            ("1,234 + 1", "comma"),
            ("x + 1", "'x' is unknown"),
            ("__import__('os').system('true')", "only numbers"),
            ("print(1)", "'print' is unknown"),
            ("max()", "max got 0 numbers"),
            ("max(*[1])", "only numbers"),
            ("round(1, digits=2)", "unknown"),
            ("'a' * 9", "only numbers"),
            ("True + 1", "only numbers"),
            ("[1][0]", "only numbers"),
            ("(lambda: 1)()", "only numbers"),
            ("1 if 1 else 2", "only numbers"),
            ("3j", "only numbers"),
            ("1 + " * 200 + "1", "characters"),
            ("-" * 399 + "1", "too many parts"),
            ("(" * 199 + "1" + ")" * 200, "no arithmetic"),
        ],
    )
    def test_refused(self, text, complaint):
        with pytest.raises(ExpressionError, match=re.escape(complaint)):
            evaluate(text)


def solve_question(family: str, numbers: dict[str, int]) -> str:
    """The answers once more, by other means than the environment's expressions."""
    n = numbers
    if family == "savings":
        held = Fraction(n["a"])
        for _ in range(n["n"]):
            held += held * n["p"] / 100
        return two_decimals(held)
    if family == "trip":
        return two_decimals(Fraction(sum((n["a"], n["b"], n["c"])), 3))
    if family == "tank":
        left = n["a"]
        for _ in range(n["m"]):
            left += n["q"] - n["n"] * n["p"]
        return str(left)
    return {
        "bill": lambda: str(n["e"] + n["d"] * n["c"] + n["b"] * n["a"]),
        "eggs": lambda: str(divmod(n["b"] + n["a"], n["c"])[1]),
        "expression": lambda: str(n["a"] * n["c"] - n["b"] * n["c"] + n["e"] * n["d"]),
    }[family]()


def two_decimals(value: Fraction) -> str:
    cents = (2 * 100 * value.numerator + value.denominator) // (2 * value.denominator)
    return f"{cents // 100}.{cents % 100:02}"


EXPRESSIONS = {
    "bill": "{a} * {b} + {c} * {d} + {e}",
    "eggs": "({a} + {b}) % {c}",
    "savings": "round({a} * (1 + {p} / 100) ** {n}, 2)",
    "tank": "{a} + {m} * {q} - {m} * {n} * {p}",
    "trip": "round(({a} + {b} + {c}) / 3, 2)",
    "expression": "({a} - {b}) * {c} + {d} * {e}",
}


async def calculates(player: Player, rng: random.Random) -> None:
    family, numbers = player.info["family"], player.info["numbers"]
    assert all(str(number) in player.prompt for number in numbers.values())
    await player.answer(await player.call("calculate", expression=EXPRESSIONS[family].format(**numbers)))


async def calculates_at_random(player: Player, rng: random.Random) -> None:
    expression = f"{number_of(player, rng)} {rng.choice('+-*/%')} {number_of(player, rng)}"
    await player.answer(await player.call("calculate", expression=expression))


async def answers_with_a_number(player: Player, rng: random.Random) -> None:
    await player.answer(number_of(player, rng))


async def answers_in_a_sentence(player: Player, rng: random.Random) -> None:
    family, numbers = player.info["family"], player.info["numbers"]
    result = await player.call("calculate", expression=EXPRESSIONS[family].format(**numbers))
    await player.answer(f"It is {result}")


async def is_silent(player: Player, rng: random.Random) -> None:
    await player.answer("")


def number_of(player: Player, rng: random.Random) -> str:
    return rng.choice(re.findall(r"[0-9]+", player.prompt))


class TestCalculator:
    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize(
        ("policy", "score", "seeds"),
        [
            (calculates, 1.0, 30),
            (calculates_at_random, 0.103, 40),
            (answers_with_a_number, 0.1, 30),
            (answers_in_a_sentence, 0.3, 20),
            (is_silent, 0.0, 9),
        ],
        ids=["perfect", "random", "number", "sentence", "silent"],
    )
    async def test_documented_scores(self, policy, score, seeds, split):
        assert await mean(Calculator, policy, range(seeds), split) == pytest.approx(score, abs=0.02)

    async def test_answers_are_right(self):
        seen = Counter()
        for seed in range(60):
            player = Player(Calculator(digits=2 + seed % 5), seed)
            right = solve_question(player.info["family"], player.info["numbers"])
            seen[player.info["family"]] += 1
            assert await player.answer(right) == 1.0, player.prompt
            again = Player(player.env, seed)
            assert await again.answer(Fraction(right) + 1 if "." not in right else right[:-1] + "x") <= 0.1
        assert set(seen) == set(QUESTIONS)

    @pytest.mark.parametrize(
        ("form", "reward"),
        [("{}", 1.0), (" {}.\n", 1.0), ("{:,}", 1.0), ("{}.0", 1.0), ("{} cents", 0.0), ("{}1", 0.1), ("{}/1", 0.0)],
    )
    async def test_forms(self, form, reward):
        player = Player(Calculator(families=["bill"]), 3)
        right = int(solve_question("bill", player.info["numbers"]))
        assert right > 1000
        assert await player.answer(form.format(right)) == reward

    async def test_wrong_expression_is_text(self):
        player = Player(Calculator(), 0)
        assert (await player.call("calculate", expression="2 +")).startswith("Error: '2 +' is no arithmetic")
        assert (await player.call("calculate", wrong="2")).startswith("Error: wrong arguments for calculate")
        await player.answer("1")
        assert player.metrics["calculation_errors"] == 1 and player.metrics["calculations"] == 1

    async def test_out_of_turns(self):
        player = Player(Calculator(max_turns=2), 0)
        await player.call("calculate", expression="1 + 1")
        assert player.reward is None
        await player.call("calculate", expression=EXPRESSIONS[player.info["family"]].format(**player.info["numbers"]))
        assert (player.reward, player.truncated) == (pytest.approx(0.3), True)

    def test_splits_are_disjoint(self):
        env = Calculator(digits=2)
        seen = {split: {Player(env, seed, split).prompt for seed in range(150)} for split in SPLITS}
        assert not seen["train"] & seen["validation"]

    @pytest.mark.parametrize(
        "kwargs", [{"digits": 1}, {"families": ["roots"]}, {"families": []}, {"families": "bill"}, {"max_turns": 0}]
    )
    def test_refuses(self, kwargs):
        with pytest.raises(ValueError, match="expected"):
            Calculator(**kwargs)


# Written from the questions' text, other than the environment's own solutions.
PROGRAMS = {
    "select": """
        def select(numbers):
            found = []
            for x in numbers:
                if (x - {r}) % {k} == 0 and x >= {low} + 1:
                    found += [x]
            return found
    """,
    "weigh": """
        def weigh(numbers):
            total = 0
            for index, x in enumerate(numbers):
                total += x * ({a}, {b})[index & 1]
            return total
    """,
    "shift": """
        def shift(text):
            a = "abcdefghijklmnopqrstuvwxyz"
            out = ""
            for i, c in enumerate(text):
                out += a[(a.index(c) + {k}) % 26] if c in a and i >= {n} else c
            return out
    """,
    "shorten": """
        import re
        def shorten(text):
            def short(match):
                run = match.group(0)
                return run[0] + str(len(run) + {n}) if len(run) >= {k} else run
            return re.sub(r"(.)\\1*", short, text)
    """,
    "digits": """
        def digits(n):
            n = n * {k}
            return (digits_of(n // {base}) if n >= {base} else "") + str(n % {base})
        def digits_of(n):
            return (digits_of(n // {base}) if n >= {base} else "") + str(n % {base})
    """,
    "merge": """
        def merge(spans):
            pieces = sorted(list(s) for s in spans)
            out = []
            for s, e in pieces:
                for other in out:
                    if s - other[1] <= {gap}:
                        other[1] = max(other[1], e)
                        break
                else:
                    out.append([s, e])
            return [s for s in out if s[1] - s[0] >= {least}]
    """,
    "top": """
        def top(words):
            kept = []
            for w in words.split(" "):
                if len(w) >= {least} and w not in kept:
                    kept.append(w)
            kept.sort()
            kept.sort(key=len, reverse=True)
            return kept[:{k}]
    """,
    "steps": """
        def steps(n):
            for taken in range({limit}):
                if n == 1:
                    return taken
                n = {a} * n + {b} if n & 1 else n >> 1
            return {limit}
    """,
}
CONSTANTS = {"select": [], "weigh": 0, "shift": "", "shorten": "", "digits": "0", "merge": [], "top": [], "steps": 12}


def program(player: Player) -> str:
    return textwrap.dedent(PROGRAMS[player.info["family"]]).format(**player.info["parameters"])


def function(player: Player, body: str) -> str:
    signature = CODE_FAMILIES[player.info["family"]].signature
    return f"def {signature}:\n    {body}"


async def programs(player: Player, rng: random.Random) -> None:
    await player.answer(f"Here it is:\n```python\n{program(player)}\n```\nIt should work.")


async def returns_its_argument(player: Player, rng: random.Random) -> None:
    signature = CODE_FAMILIES[player.info["family"]].signature
    await player.answer(function(player, "return " + signature.partition("(")[2].rstrip(")")))


async def returns_a_constant(player: Player, rng: random.Random) -> None:
    await player.answer(function(player, f"return {CONSTANTS[player.info['family']]!r}"))


class TestPythonCode:
    @only_long
    @pytest.mark.parametrize(
        ("policy", "score", "tolerance", "seeds"),
        [(programs, 1.0, 0, 16), (returns_its_argument, 0.05, 0.1, 10), (returns_a_constant, 0.07, 0.1, 10)],
        ids=["perfect", "argument", "constant"],
    )
    async def test_documented_scores(self, policy, score, tolerance, seeds):
        for split in SPLITS:
            found = await mean(PythonCode, policy, range(seeds // 2), split)
            assert found == pytest.approx(score, abs=tolerance)

    @pytest.mark.parametrize("family", list(CODE_FAMILIES))
    def test_reference_and_other_solution_agree(self, family):
        """Without the sandbox: 20 tasks of each family, 20 tests each."""
        for seed in range(20):
            player = Player(PythonCode([family], tests=20), seed, SPLITS[seed % 2])
            namespace: dict[str, Any] = {}
            exec(program(player), namespace)
            for arguments, expected in player.env._task.tests:
                result = namespace[family](*json.loads(json.dumps(arguments)))
                assert agrees(json.loads(json.dumps(result)), expected), (player.prompt, arguments, result, expected)

    async def test_partial_credit(self):
        player = Player(PythonCode(["digits"], tests=10), 1)
        hidden = [arguments[0] for arguments, _ in player.env._task.tests[2:]]
        code = program(player).replace("n = n *", f"if n in {hidden[:3]}:\n        return 1 / 0\n    n = n *")
        assert await player.answer(f"```python\n{code}```") == 0.7
        assert player.metrics == {"solved": 0.0, "ran": 1.0, "cut_off": 0.0, "runs": 0.0}

    @pytest.mark.parametrize(
        ("body", "reward", "cut_off"),
        [
            pytest.param("while True: pass", 0.0, 1.0, marks=[pytest.mark.slow, only_long]),
            ("import os; os._exit(0)", 0.0, 0.0),
            ("raise SystemExit(0)", 0.0, 0.0),
            ("return type('Any', (str,), {'__eq__': lambda self, other: True})('')", 0.0, 0.0),
            ("return {1, 2}", 0.0, 0.0),
        ],
    )
    async def test_no_credit(self, body, reward, cut_off):
        player = Player(PythonCode(["shorten"]), 0)
        assert await player.answer(function(player, body)) == reward
        assert player.metrics["cut_off"] == cut_off

    @pytest.mark.parametrize("answer", ["", "I do not know.", "```python\ndef other(): pass\n```", "\x00", "def f(:"])
    async def test_no_program(self, answer):
        assert await Player(PythonCode(), 0).answer(answer) == 0.0

    async def test_tool(self):
        player = Player(PythonCode(max_runs=3), 0)
        assert await player.call("run_python", code="print('a')\nprint(6 * 7)") == "a\n42"
        text = await player.call("run_python", code="def f():\n    return 1 / 0\nf()")
        assert text.endswith("ZeroDivisionError: division by zero\n[exit status 1]") and "line 2, in f" in text
        assert await player.call("run_python", code="x = 1") == "[no output]"
        assert await player.call("run_python", code="print(1)") == "Error: all 3 runs are used up; answer now"

    async def test_expected_results_are_not_in_the_process(self):
        player = Player(PythonCode(["weigh"], tests=5), 0)
        spy = """
        import gc, sys
        def weigh(numbers):
            frame, seen = sys._getframe(), []
            while frame:
                seen.append(repr({**frame.f_locals, **frame.f_globals}))
                frame = frame.f_back
            return "".join(seen)
        """
        expected = [result for _, result in player.env._task.tests[2:]]
        secret = max(expected, key=abs)
        arguments = player.env._task.tests[2][0]
        outcome = await run_program(textwrap.dedent(spy), [("weigh", arguments)], name="answer")
        assert str(arguments[0]) in outcome.results[0]["value"] and str(secret) not in outcome.results[0]["value"]

    @pytest.mark.parametrize("family", list(CODE_FAMILIES))
    def test_any_number_of_tests(self, family):
        for tests in (1, 100):
            player = Player(PythonCode([family], tests=tests), 2)
            hidden = player.env._task.tests[2:]
            assert len({repr(arguments) for arguments, _ in hidden}) == tests
            assert max(Counter(repr(result) for _, result in hidden).values()) <= 1 + tests // 2

    def test_splits_are_disjoint_and_both_there(self):
        for family in CODE_FAMILIES:
            env = PythonCode([family], tests=1)
            seen = {
                split: {json.dumps(Player(env, seed, split).info, sort_keys=True) for seed in range(60)}
                for split in SPLITS
            }
            assert not seen["train"] & seen["validation"]
            assert min(len(tasks) for tasks in seen.values()) >= 3, family

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("```python\na = 1\n```", "a = 1"),
            ("```\na = 1\n```", "a = 1"),
            ("Text\n```py\na\n```\nmore\n``` python\nb\nc\n```\nend", "b\nc"),
            ("```python\na = 1", "a = 1"),
            ("a = 1", "a = 1"),
            ("", ""),
        ],
    )
    def test_program_of(self, text, code):
        assert program_of(text) == code

    @pytest.mark.parametrize(
        ("result", "expected", "same"),
        [
            (1, 1, True),
            (True, 1, False),
            (1.0, 1, False),
            ("1", 1, False),
            ([1, [2]], [1, (2,)], True),
            ([1], [1, 2], False),
            ({}, [], False),
            (None, 0, False),
        ],
    )
    def test_agrees(self, result, expected, same):
        assert agrees(result, expected) is same

    @pytest.mark.parametrize(
        "kwargs", [{"families": ["x"]}, {"families": []}, {"tests": 0}, {"tests": 101}, {"max_runs": -1}, {"cpu_s": 0}]
    )
    def test_refuses(self, kwargs):
        with pytest.raises(ValueError, match="expected"):
            PythonCode(**kwargs)


async def works(player: Player, rng: random.Random, *, moves: bool = True) -> None:
    """A clerk that reads the requests and asks the tools for everything else."""
    warehouses: list[str] = []
    for request in player.prompt.splitlines():
        assert player.reward is None

        async def sku_of(name: str) -> str:
            [found] = [item for item in await player.call("find_items", text=name) if item["name"] == name]
            return found["sku"]

        if match := re.search(r"Ship (.+)'s open order of the (.+) from (.+)\. If .* there from (.+)\.", request):
            customer, name, warehouse, other = match.groups()
            order = await open_order(player, customer, await sku_of(name))
            stock = await player.call("get_stock", sku=order["sku"])
            missing = order["count"] - stock[warehouse]
            if missing > 0 and moves:
                await player.call("move_stock", sku=order["sku"], source=other, target=warehouse, count=missing)
            await player.call("ship_order", order_id=order["order_id"], warehouse=warehouse)
        elif match := re.search(r"Cancel (.+)'s open order of the (.+)\.", request):
            order = await open_order(player, match[1], await sku_of(match[2]))
            await player.call("cancel_order", order_id=order["order_id"])
        elif match := re.search(r"Buy as many of the (.+) for (.+) as it takes to hold (\d+) there", request):
            sku = await sku_of(match[1])
            stock = await player.call("get_stock", sku=sku)
            await player.call("buy_stock", sku=sku, warehouse=match[2], count=int(match[3]) - stock[match[2]])
        else:
            match = re.search(r"Move all pieces of the (.+) that are in other warehouses to (.+)\.", request)
            assert match, request
            sku = await sku_of(match[1])
            stock = await player.call("get_stock", sku=sku)
            warehouses = [w for w in stock if w != match[2] and stock[w]]
            for warehouse in warehouses:
                await player.call("move_stock", sku=sku, source=warehouse, target=match[2], count=stock[warehouse])
    await player.answer("Done.")


async def open_order(player: Player, customer: str, sku: str) -> dict[str, Any]:
    orders = await player.call("find_orders", customer=customer, status="open")
    # "Eve Park" is a part of "Eve Parker", too.
    [order] = [order for order in orders if order["sku"] == sku and order["customer"] == customer]
    return order


async def forgets_to_move(player: Player, rng: random.Random) -> None:
    await works(player, rng, moves=False)


async def calls_at_random(player: Player, rng: random.Random) -> None:
    stock = player.env._stock
    for _ in range(11):
        sku, order_id, count = rng.choice(list(stock.items)), rng.choice(list(stock.orders)), rng.randint(1, 20)
        source, target = rng.sample(stock.warehouses, 2)
        name, arguments = rng.choice(
            [
                ("find_items", {}),
                ("find_orders", {}),
                ("get_stock", {"sku": sku}),
                ("move_stock", {"sku": sku, "source": source, "target": target, "count": count}),
                ("buy_stock", {"sku": sku, "warehouse": source, "count": count}),
                ("ship_order", {"order_id": order_id, "warehouse": source}),
                ("cancel_order", {"order_id": order_id}),
            ]
        )
        await player.call(name, **arguments)
    await player.answer("Done.")


class TestWarehouse:
    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize(
        ("policy", "score", "tolerance", "seeds"),
        [
            (works, 1.0, 0, 20),
            (forgets_to_move, 0.675, 0.15, 30),
            (calls_at_random, 0.0, 0.01, 15),
            (is_silent, 0, 0, 9),
        ],
        ids=["perfect", "lazy", "random", "silent"],
    )
    async def test_documented_scores(self, policy, score, tolerance, seeds, split):
        assert await mean(Warehouse, policy, range(seeds), split) == pytest.approx(score, abs=tolerance)

    @pytest.mark.parametrize("requests", [1, 2, 3, 4])
    async def test_more_requests(self, requests):
        for seed in range(4):
            player = Player(Warehouse(requests, max_turns=30), seed)
            assert len(player.prompt.splitlines()) == requests
            await works(player, random.Random(0))
            assert player.reward == 1.0, player.prompt

    async def test_partial_credit_and_wrong_changes(self):
        def fresh() -> Player:
            player = Player(Warehouse(requests=2, max_turns=30), seed)
            return player

        seed = next(s for s in range(99) if re.search(r"Cancel .*\n.*Buy", Player(Warehouse(), s).prompt))
        half = fresh()
        customer, name = re.search(r"Cancel (.+)'s open order of the (.+)\.", half.prompt).groups()
        [sku] = [item["sku"] for item in await half.call("find_items") if item["name"] == name]
        order = await open_order(half, customer, sku)
        assert await half.call("cancel_order", order_id=order["order_id"]) == f"cancelled {order['order_id']}"
        again = await half.call("cancel_order", order_id=order["order_id"])
        assert again == f"Error: order {order['order_id']} is already cancelled"
        assert await half.answer("Done.") == 0.5

        spoilt = fresh()
        await spoilt.call("cancel_order", order_id=order["order_id"])
        others = [o for o in await spoilt.call("find_orders", status="open") if o["sku"] != sku]
        await spoilt.call("cancel_order", order_id=others[0]["order_id"])
        assert await spoilt.answer("Done.") == 0.0
        assert spoilt.metrics["wrong_changes"] == 1.0

    async def test_errors_change_nothing(self):
        player = Player(Warehouse(), 0)
        before = dict(player.env._stock.facts())
        sku = next(iter(player.env._stock.items))
        one, two, _ = player.env._stock.warehouses
        for name, arguments, complaint in (
            ("move_stock", {"sku": sku, "source": one, "target": two, "count": 999}, "holds only"),
            ("move_stock", {"sku": sku, "source": one, "target": one, "count": 1}, "two warehouses"),
            ("move_stock", {"sku": sku, "source": one, "target": two, "count": -1}, "count: Input should be greater"),
            ("buy_stock", {"sku": "S0", "warehouse": one, "count": 1}, "no item with the SKU 'S0'"),
            ("buy_stock", {"sku": sku, "warehouse": "Atlantis", "count": 1}, "no warehouse 'Atlantis'; expected"),
            ("ship_order", {"order_id": "O1", "warehouse": one}, "no order 'O1'"),
            ("find_orders", {"status": "lost"}, "status: Input should be 'open', 'shipped' or 'cancelled'"),
        ):
            text = await player.call(name, **arguments)
            assert text.startswith("Error: ") and complaint in text, text
        assert player.env._stock.facts() == before

    async def test_out_of_turns_is_graded(self):
        player = Player(Warehouse(requests=1, max_turns=40), 5)
        await works(player, random.Random(0))
        assert (player.reward, player.truncated) == (1.0, False)
        turns = int(player.metrics["turns"])
        cut = Player(Warehouse(requests=1, max_turns=turns), 5)
        with pytest.raises(AssertionError, match="the episode is over"):
            await works(cut, random.Random(0))
        assert cut.truncated

    def test_splits_are_disjoint_and_tasks_vary(self):
        env = Warehouse()
        seen = {split: {Player(env, seed, split).prompt for seed in range(60)} for split in SPLITS}
        assert not seen["train"] & seen["validation"]
        assert all(len(prompts) == 60 for prompts in seen.values())

    @pytest.mark.parametrize("kwargs", [{"requests": 0}, {"requests": 5}, {"max_turns": 0}])
    def test_refuses(self, kwargs):
        with pytest.raises(ValueError, match="expected"):
            Warehouse(**kwargs)
