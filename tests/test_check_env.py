"""`check_env`: every fault is found and told in words, and environments without one pass."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tiers import only_long

import raygym.env
from raygym.check_env import check_env
from raygym.check_tools import tool_problems
from raygym.cli import main
from raygym.env import ChatEnv

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}


class Good(ChatEnv):
    def __init__(self, length: int = 3) -> None:
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return f"Say {self.np_random.integers(10**9)}.", {}

    def step(self, action):
        self.steps += 1
        return f"Again, {self.np_random.integers(10**9)}.", 1.0, self.steps >= self.length, False, {}


class GoodAsync(Good):
    first = True

    async def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)

    async def step(self, action):
        await asyncio.sleep(1.2 if self.first else 0)
        type(self).first = False
        return super().step(action)

    async def close(self):
        await asyncio.sleep(0)


class GoodTools(Good):
    tools = (LOOK,)

    def step(self, action):
        self.steps += 1
        calls = action.get("tool_calls", ())
        answers = [{"role": "tool", "tool_call_id": call["id"], "content": "Nothing there."} for call in calls]
        return answers or "Use a tool.", 0.0, self.steps > 9, False, {}


class GoodInOneThread(Good):
    """As a database handle would, it refuses other threads."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def step(self, action):
        assert threading.get_ident() == self.thread
        return super().step(action)

    def close(self):
        assert threading.get_ident() == self.thread


class GoodBlocking(Good):
    first = True

    def reset(self, *, seed=None, options=None):
        time.sleep(1.2 if self.first else 0)
        type(self).first = False
        return super().reset(seed=seed)


class Unseeded(Good):
    def reset(self, *, seed=None, options=None):
        return f"{np.random.default_rng().integers(10**9)}", {}


class UnseededLater(Good):
    def step(self, action):
        return f"{random.random()}", 0.0, True, False, {}


class UnseededReward(Good):
    def step(self, action):
        return "x", random.random(), True, False, {}


class RemembersLastEpisode(Good):
    def reset(self, *, seed=None, options=None):
        RemembersLastEpisode.count = getattr(RemembersLastEpisode, "count", 0) + 1
        return f"Episode {RemembersLastEpisode.count}", {}


class NotFinite(Good):
    def step(self, action):
        return "x", float("nan"), True, False, {}


class Raises(Good):
    def step(self, action):
        raise KeyError("board")


class RaisesForText(Good):
    def step(self, action):
        return "Next.", float(int(action["content"])), False, False, {}


class RaisesForUnknownTools(GoodTools):
    def step(self, action):
        for call in action.get("tool_calls", ()):
            {"look": 1}[call["function"]["name"]]
        return super().step(action)


class RaisesInAsync(Good):
    async def step(self, action):
        raise ConnectionError("no server")


class NoStep(ChatEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "x", {}


class NoOptions(Good):
    def reset(self, *, seed=None):
        return super().reset(seed=seed)


class NoAction(Good):
    def step(self):
        return "x", 0.0, True, False, {}


class Endless(Good):
    def step(self, action):
        return "More.", 0.0, False, False, {}


class NamesSomeRewards(Good):
    """Says of the second of two equal rewards only what it consists of."""

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.steps += 1
        last = self.steps == 2
        return "x", 0.5, last, False, {"rewards": {"right": 0.5}} if last else {}


class BlocksTheLoop(Good):
    def reset(self, *, seed=None, options=None):
        self.blocking = options["split"] == "train"
        return super().reset(seed=seed)

    async def step(self, action):
        time.sleep(1.2 if self.blocking else 0)
        return "x", 0.0, True, False, {}


class Hangs(Good):
    def step(self, action):
        time.sleep(0.8)
        return super().step(action)


class CloseRaises(Good):
    def close(self):
        raise OSError("already closed")


class CloseRaisesAsync(Good):
    async def close(self):
        raise OSError("already closed")


class WrongObservation(Good):
    def reset(self, *, seed=None, options=None):
        return np.zeros(3), {}


class OldStep(Good):
    def step(self, action):
        return "x", 0.0, True, {}


class BadTools(Good):
    tools = ({"name": "f"},)


class OnlyTraining(Good):
    def reset(self, *, seed=None, options=None):
        if options["split"] == "validation":
            raise ValueError("no validation tasks")
        return super().reset(seed=seed)


@pytest.fixture(autouse=True)
def a_busy_machine_blocks_no_loop(monkeypatch):
    """Another process may hold this one up for longer than a run would bear of an environment."""
    monkeypatch.setattr("raygym.check_env._BLOCKED_S", 1.0)


@pytest.mark.parametrize("kind", [Good, GoodAsync, GoodTools, GoodInOneThread, GoodBlocking])
def test_good(kind):
    assert check_env(f"{__name__}:{kind.__name__}") == []
    if kind is not GoodInOneThread:
        assert check_env(kind()) == []


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (Unseeded, "reset(seed=0) in split train gave two different first observations"),
        (RemembersLastEpisode, "two different first observations"),
        (UnseededLater, "the same replies were answered differently at step 1"),
        (UnseededReward, "the same replies were answered differently at step 1"),
        (NotFinite, "step 1 in split train: step returned reward nan; expected a finite number"),
        (Raises, "step 1 in split train: env.step raised KeyError: 'board'"),
        (RaisesForText, "step 2 in split train: env.step raised ValueError"),
        (RaisesForUnknownTools, "KeyError: 'no_such_tool'"),
        (RaisesInAsync, "ConnectionError: no server"),
        (NoStep, "NoStep must implement step"),
        (NoOptions, "cannot be called as reset(seed=..., options=...): got an unexpected keyword argument 'options'"),
        (NoAction, "step() cannot be called as step(action)"),
        (Endless, "did not end within 12 turns"),
        (NamesSomeRewards, "whose sum is 0.5, with a reward of 1; expected the reward as their sum"),
        (BlocksTheLoop, "step 1 in split train blocked the event loop for "),
        (Hangs, "env.step took longer than 0.4 s"),
        (CloseRaises, "close raised OSError: already closed"),
        (CloseRaisesAsync, "close raised OSError: already closed"),
        (WrongObservation, "the observation is ndarray"),
        (OldStep, "expected a tuple (observation, reward, terminated, truncated, info)"),
        (BadTools, "tools[0] is {'name': 'f'}"),
        (OnlyTraining, "reset in split validation: env.reset raised ValueError: no validation tasks"),
    ],
)
@pytest.mark.parametrize("by", [pytest.param("id", marks=only_long), "instance"])
def test_faults_are_told(kind, complaint, by):
    env = f"{__name__}:{kind.__name__}" if by == "id" else kind()
    problems = check_env(env, max_turns=12, timeout_s=0.4 if kind is Hangs else 30)
    assert any(complaint in problem for problem in problems), problems
    assert len(problems) == len(set(problems)) <= 4


def test_kwargs():
    assert check_env(f"{__name__}:Good", {"length": 2}) == []
    assert "did not end within 5 turns" in check_env(f"{__name__}:Good", {"length": 9}, max_turns=5)[0]
    assert "envs[].kwargs" in check_env(f"{__name__}:Good", {"lenght": 9})[0]
    assert "kwargs cannot be pickled" in check_env(f"{__name__}:Good", {"length": lambda: 3})[0]


class CloseNeedsReset(Good):
    def close(self):
        del self.steps


def test_closing_what_was_never_reset():
    assert check_env(f"{__name__}:CloseNeedsReset") == [
        "close before any reset raised AttributeError: 'CloseNeedsReset' object has no attribute 'steps'"
    ]


def test_what_is_no_environment():
    assert "subclass raygym.ChatEnv" in check_env(object())[0]
    assert "subclass raygym.ChatEnv" in check_env("builtins:dict")[0]
    assert "did you mean Good" in check_env(f"{__name__}:Goood")[0]


def test_reached_from_the_contract_and_inside_an_event_loop():
    async def inside():
        return raygym.env.check_env(GoodAsync(length=1))

    assert asyncio.run(inside()) == []


@pytest.mark.parametrize(
    "env",
    [
        ("raygym/NumberGuess-v0", {}),
        ("raygym/Arithmetic-v0", {}),
        ("raygym/ReasoningGym-v0", {"dataset": "chain_sum"}),
        ("raygym/TextGym-v0", {"env": "FrozenLake-v1"}),
        ("raygym/TextGym-v0", {"env": "Blackjack-v1"}),
        ("raygym/TextGym-v0", {"env": "CliffWalking-v1", "params": {"max_episode_steps": 20}}),
        ("raygym/TextArena-v0", {"game": "Sudoku-v0"}),
        ("raygym/TextArena-v0", {"game": "2048-v0"}),
    ],
    ids=str,
)
def test_built_ins(env):
    assert check_env(*env) == []


def tool(**changes):
    function = {**LOOK["function"], **changes}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        (LOOK, "tools is dict"),
        (["look"], "tools[0] is 'look'; expected"),
        ([LOOK["function"]], "tools[0] is {'name'"),
        ([LOOK, {**LOOK, "type": "tool"}], "tools[1] is"),
        ([tool(name=None)], "tools[0].function.name is None"),
        ([tool(name="look at")], "tools[0].function.name is 'look at'"),
        ([tool(description=3)], "tools[0].function.description is 3"),
        ([tool(parameters=[])], "tools[0].function.parameters is []"),
        ([tool(parameters={"type": "string"})], "tools[0].function.parameters is {'type': 'string'}"),
        ([tool(parameters={"properties": {"at": {"type": "text"}}})], "parameters is no JSON schema: 'text' is not"),
        ([tool(parameters={"properties": {"at": str}})], "parameters is no JSON schema"),
        ([tool(parameters={"properties": {}, "required": ["at"]})], "required names 'at', which is not in properties"),
        ([tool(), tool()], "tools: two are called 'look'"),
        ([tool(parameters={"properties": {"at": {"enum": [{1}]}}})], "cannot be written as JSON"),
    ],
)
def test_wrong_tools_are_told(tools, complaint):
    problems = tool_problems(tools)
    assert any(complaint in problem for problem in problems), problems


def test_right_tools():
    assert tool_problems(()) == tool_problems([LOOK]) == []
    assert tool_problems([tool(parameters={}), tool(name="b", parameters=None, description=None)]) == []


class TestCommand:
    def test_good(self, capsys):
        assert main(["env", "check", "raygym/NumberGuess-v0", "--kwargs", "{high: 50, attempts: 2}"]) == 0
        assert capsys.readouterr().out == "raygym/NumberGuess-v0: nothing is wrong\n"

    def test_problems_are_listed(self, capsys):
        assert main(["env", "check", f"{__name__}:Endless", "--turns", "3"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.startswith("- an episode in split") for line in lines] == [True, True]
        assert main(["env", "check", f"{__name__}:Good", "--kwargs", "{lenght: 1}"]) == 1
        assert "envs[].kwargs" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["raygym/NumberGues-v0"], "did you mean raygym/NumberGuess-v0"),
            (["no_such_module:Env"], "cannot be imported"),
            (["raygym/NumberGuess-v0", "--kwargs", "high"], "--kwargs: 'high' is no mapping"),
            (["raygym/NumberGuess-v0", "--kwargs", "{high"], "--kwargs: '{high' is no mapping"),
        ],
    )
    def test_bad_usage(self, arguments, complaint, capsys):
        assert main(["env", "check", *arguments]) == 2
        output = capsys.readouterr()
        assert complaint in output.err and output.err.count("\n") == 1 and output.out == ""

    @only_long
    def test_in_a_shell(self, tmp_path):
        (tmp_path / "mine.py").write_text("import raygym\nclass Mine(raygym.ChatEnv): pass\n")
        code = f"import sys; sys.path[:0] = {sys.path!r}; from raygym.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "env", "check", "mine:Mine"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout.startswith("- reset in split train: reset returned")
