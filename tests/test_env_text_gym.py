"""Gymnasium's own environments as conversations: FrozenLake solved, Blackjack repeated, unreadable replies bounded."""

from __future__ import annotations

from collections import deque

import gymnasium
import pytest

from raygym.env import EnvError, make_env
from raygym.envs.text_gym import TextGym

MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
LAKE = {"env": "FrozenLake-v1", "params": {"is_slippery": False}}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def way(text: str) -> list[str]:
    """The shortest way over a lake, read from what the policy sees: G is the last corner, P the first."""
    rows = [line for line in text.splitlines() if line and set(line) <= set("SFHGP")]
    size = len(rows)
    start, goal = (0, 0), (size - 1, size - 1)
    came: dict[tuple[int, int], list[str]] = {start: []}
    queue = deque([start])
    while queue:
        row, column = queue.popleft()
        for name, (down, right) in MOVES.items():
            place = (row + down, column + right)
            inside = min(place) >= 0 and max(place) < size
            if place not in came and inside and rows[place[0]][place[1]] != "H":
                came[place] = [*came[row, column], name]
                queue.append(place)
    return came[goal]


@pytest.mark.parametrize(
    "kwargs",
    [
        LAKE,
        {"env": "FrozenLake8x8-v1", "params": {"is_slippery": False}},
        {**LAKE, "per_task": "raygym.envs.toy_text:random_lake"},
        {**LAKE, "params": {"desc": ["SHF", "FHF", "FFG"], "is_slippery": False}},
    ],
)
def test_a_lake_is_crossed_by_reading_it(kwargs):
    env = make_env("raygym/TextGym-v0", kwargs)
    for seed in range(4):
        text, _ = env.reset(seed=seed)
        assert "Answer with one of: left, down, right, up." in text
        *moves, last = way(text)
        for move in moves:
            text, reward, terminated, truncated, _ = env.step(say(f"I go {move.upper()}."))
            assert (reward, terminated, truncated) == (0.0, False, False)
            assert text.count("P") == 1
        text, reward, terminated, _, info = env.step(say(last))
        assert (reward, terminated) == (1.0, True)
        assert text.endswith("You reached the goal.")
        assert info["metrics"] == {"return": 1.0, "steps": float(len(moves) + 1), "format": 1.0}
    env.close()


def test_a_hole_ends_the_walk():
    env = TextGym(**LAKE)
    env.reset(seed=0)
    env.step(say("right"))
    text, reward, terminated, _, _ = env.step(say("down"))
    assert (reward, terminated) == (0.0, True) and "hole" in text


def test_maps_per_task_differ_and_repeat():
    kwargs = {**LAKE, "per_task": "raygym.envs.toy_text:random_lake"}
    maps = [TextGym(**kwargs).reset(seed=seed)[0] for seed in range(8)]
    assert len(set(maps)) > 4
    env = TextGym(**kwargs)
    assert [env.reset(seed=seed)[0] for seed in range(8)] == maps
    assert env.reset(seed=3, options={"split": "validation"})[0] != maps[3]


def play_blackjack(env: TextGym, seed: int, split: str) -> list[object]:
    """Hit below 17, as a dealer does."""
    seen: list[object] = [env.reset(seed=seed, options={"split": split})[0]]
    while True:
        total = int(str(seen[-1] if len(seen) == 1 else seen[-1][0]).split("cards sum to ")[1].split()[0].rstrip("."))
        result = env.step(say("hit" if total < 17 else "stick"))
        seen.append(result[:4])
        if result[2]:
            return seen


def test_blackjack_repeats_by_seed_and_pays():
    env, other = TextGym("Blackjack-v1"), TextGym("Blackjack-v1")
    games = {}
    for split in ("train", "validation"):
        games[split] = [play_blackjack(env, seed, split) for seed in range(60)]
        assert [play_blackjack(other, seed, split) for seed in range(60)] == games[split]
    assert games["train"] != games["validation"]
    rewards = [game[-1][1] for game in games["train"]]
    assert {-1.0, 1.0} <= set(rewards) <= {-1.0, 0.0, 1.0}


def test_unreadable_replies_are_answered_cost_and_are_bounded():
    env = TextGym(**LAKE, unreadable_reward=-0.25, max_unreadable=2)
    env.reset(seed=0)
    for reply in ("left or right", "north"):
        text, reward, terminated, _, _ = env.step(say(reply))
        assert text == "Answer with exactly one of: left, down, right, up."
        assert reward == -0.25
        if not terminated:
            env.step(say("down"))
    assert not terminated
    env.step(say(""))
    _, _, terminated, _, info = env.step(say("leftover"))
    assert terminated and info["metrics"] == {"return": -1.0, "steps": 6.0, "format": pytest.approx(2 / 6)}


class Counter(gymnasium.Env):
    """Actions -1, 0 and 1 move a number; it ends at 2."""

    action_space = gymnasium.spaces.Discrete(3, start=-1)
    observation_space = gymnasium.spaces.Discrete(9, start=-4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.at, {}

    def step(self, action):
        self.at += action
        return self.at, float(self.at == 2), self.at == 2, False, {}


class Speller(Counter):
    action_space = gymnasium.spaces.Text(3, charset="abc")

    def step(self, action):
        return "done", float(action == "cab"), True, False, {}


class Steered(Counter):
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def step(self, action):
        return "done", float(action[0]), True, False, {}


def steer(reply, env):
    try:
        return [float(part) for part in reply.split(",")]
    except ValueError:
        raise ValueError("Answer with two numbers.") from None


def describe(observation, env):
    return f"The number is {observation} of {type(env.unwrapped).__name__}."


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    for kind in (Counter, Speller, Steered):
        gymnasium.register(f"test/{kind.__name__}-v0", kind)


def test_numbers_where_actions_have_no_names():
    env = TextGym("test/Counter-v0", observe=f"{__name__}:describe")
    assert env.reset(seed=0)[0].endswith("from -1 to 1, only.\n\nThe number is 0 of Counter.")
    assert env.step(say("2"))[0] == "Answer with a number from -1 to 1, and nothing else."
    env.step(say("1"))
    assert env.step(say(" 1. "))[1:3] == (1.0, True)


def test_names_of_the_users():
    env = TextGym("test/Counter-v0", actions=["count down", "stay", "count"], instruction="Reach 2.")
    assert env.reset(seed=0)[0] == "Reach 2. Answer with one of: count down, stay, count.\n\nObservation: 0"
    assert env.step(say("Count down"))[0] == "Observation: -1"
    assert env.step(say("count!"))[0] == "Observation: 0"


def test_text_and_functions():
    env = TextGym("test/Speller-v0")
    env.reset(seed=0)
    assert "no possible action" in env.step(say("xyz"))[0]
    assert env.step(say("cab "))[1] == 1.0
    env = TextGym("test/Steered-v0", act=f"{__name__}:steer")
    env.reset(seed=0)
    assert env.step(say("left"))[0] == "Answer with two numbers."
    assert env.step(say("0.5, 1"))[1] == 0.5


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"env": "FrozenLak-v1"}, r"env, params: FrozenLak-v1 .*FrozenLake"),
        ({"env": "FrozenLake-v1", "params": {"size": 3}}, "env, params: FrozenLake-v1"),
        ({"env": "FrozenLake-v1", "params": {"map_name": "5x5"}}, "env, params: FrozenLake-v1"),
        ({"env": "FrozenLake-v1", "actions": ["left", "right"]}, "actions: .*list of 4 names"),
        ({"env": "FrozenLake-v1", "actions": ["a", "b", "A", "c"]}, "actions: .*differ"),
        ({"env": "FrozenLake-v1", "observe": "raygym.envs.toy_text:sea"}, "observe: .*no function 'sea'"),
        ({"env": "FrozenLake-v1", "observe": "sea"}, "observe: 'sea'; expected module:function"),
        ({"env": "FrozenLake-v1", "per_task": "no_such_module:f"}, "per_task: .*cannot be imported"),
        ({"env": "test/Steered-v0"}, "act: actions are Box"),
        ({"env": "FrozenLake-v1", "max_unreadable": 0}, "max_unreadable: 0"),
    ],
)
def test_wrong_arguments_are_named(kwargs, complaint):
    with pytest.raises(EnvError, match=complaint):
        make_env("raygym/TextGym-v0", kwargs)
