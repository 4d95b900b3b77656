"""TextArena's games played to their ends by scripts that read only what the policy reads."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest

from raygym.env import EnvError, make_env
from raygym.envs.text_arena import TextArena

Player = Callable[[str, list[str]], str]
"""(the first message, all messages since) -> the next move."""


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def play(env, player: Player, seed: int, split: str = "train", moves: int = 200) -> tuple[list[str], float]:
    first, _ = env.reset(seed=seed, options={"split": split})
    seen: list[str] = []
    for _ in range(moves):
        text, reward, terminated, truncated, _ = env.step(say(player(first, seen)))
        seen.append(text)
        if terminated:
            return [first, *seen], reward
        assert reward == 0.0 and not truncated
    raise AssertionError(f"not over after {moves} moves: {seen[-1]}")


def halve(first: str, seen: list[str]) -> str:
    low, high = map(int, re.search(r"between (\d+) and (\d+)", first).groups())
    for text in seen:
        guess = (low + high) // 2
        low, high = (guess + 1, high) if "higher" in text else (low, guess - 1)
    return f"My guess is [{(low + high) // 2}]"


def hanoi(first: str, seen: list[str]) -> str:
    def moves(disks: int, source: str, target: str, spare: str) -> list[str]:
        if not disks:
            return []
        above = moves(disks - 1, source, spare, target), moves(disks - 1, spare, target, source)
        return [*above[0], f"{source} {target}", *above[1]]

    return moves(int(re.search(r"with (\d+) disks", first)[1]), "A", "C", "B")[len(seen)]


def crack(first: str, seen: list[str]) -> str:
    """Mastermind: always a code that agrees with every answer."""
    guesses = [tuple(map(int, re.search(r"Submitted \[([\d ]+)\]", text)[1].split())) for text in seen]
    answers = [tuple(map(int, re.findall(r"(\d+) (?:black|white)", text))) for text in seen]

    def answer(code, guess):
        black = sum(a == b for a, b in zip(code, guess, strict=True))
        return black, len(set(code) & set(guess)) - black

    codes = permutations(range(1, 7), 4)
    fits = (c for c in codes if all(answer(c, g) == a for g, a in zip(guesses, answers, strict=True)))
    return f"[{' '.join(map(str, next(fits)))}]"


def follow_the_ball(first: str, seen: list[str]) -> str:
    cups = re.search(r"Ball starts: (.*)", first)[1].replace("[", "").replace("]", "").split()
    ball = cups.index("X")
    for one, other in re.findall(r"swapped cups (\d) and (\d)", first):
        ball = {int(one): int(other), int(other): int(one)}.get(ball, ball)
    return f"[{ball}]"


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("game", "params", "player"),
    [
        ("GuessTheNumber-v0", {}, halve),
        ("GuessTheNumber-v0", {"max_number": 400}, halve),
        ("TowerOfHanoi-v0", {}, hanoi),
        ("TowerOfHanoi-v0-medium", {}, hanoi),
        ("Mastermind-v0", {}, crack),
        ("ThreeCardMonte-v0", {}, follow_the_ball),
    ],
)
def test_games_are_won(game, params, player, split):
    env = make_env("raygym/TextArena-v0", {"game": game, "params": params})
    for seed in range(4):
        _, reward = play(env, player, seed, split)
        assert reward == 1.0


def test_the_games_reward_is_the_reward():
    """Stopping at the first value wins where it is the largest of five, which is in a fifth of all games."""
    env = TextArena("Secretary-v0")
    rewards = [play(env, lambda first, seen: "accept", seed)[1] for seed in range(150)]
    assert set(rewards) == {0.0, 1.0} or set(rewards) == {-1.0, 1.0}
    assert 0.1 < sum(reward == 1.0 for reward in rewards) / 150 < 0.3


@pytest.mark.parametrize("game", ["GuessTheNumber-v0", "Countdown-v0", "Cryptarithm-v0", "Slitherlink-v0", "2048-v0"])
def test_a_second_invalid_move_ends_the_game(game):
    env = TextArena(game)
    env.reset(seed=1)
    text, _, terminated, _, _ = env.step(say("what?"))
    assert "invalid move" in text and not terminated
    assert not re.search(r"Reason: -?[\d.]+ Please", text)
    text, reward, terminated, _, info = env.step(say("what?"))
    assert terminated and -1.0 <= reward < 1.0 and "Invalid" in text
    assert info["metrics"]["invalid_move"] == 1.0


# Bandit and 2048 draw at each move, Secretary through a name bound in its constructor.
GAMES = ["2048-v0", "Bandit-v0", "Secretary-v0", "Sudoku-v0", "Minesweeper-v0-small", "LightsOut-v0", "Blackjack-v0"]
MOVES = {
    "2048-v0": ["[up]", "[left]", "[down]", "[right]"],
    "Bandit-v0": ["[red]", "[blue]", "[green]"],
    "Secretary-v0": ["[continue]"],
    "Sudoku-v0": ["[1 1 1]"],
    "Minesweeper-v0-small": ["[0 0]", "[2 2]", "[4 4]"],
    "LightsOut-v0": ["[0 0]", "[1 1]"],
    "Blackjack-v0": ["[hit]", "[stand]"],
}


def record(game: str, seed: int, split: str = "train") -> list[object]:
    env = TextArena(game)
    seen: list[object] = [env.reset(seed=seed, options={"split": split})[0]]
    for move in range(12):
        random.random()  # somebody else in the process draws from Python's generator
        seen.append(env.step(say(MOVES[game][move % len(MOVES[game])])))
        if seen[-1][2]:
            break
    return seen


@pytest.mark.parametrize("game", GAMES)
def test_a_seed_is_a_game(game):
    assert record(game, 7) == record(game, 7)
    assert record(game, 7) != record(game, 8)
    assert record(game, 7) != record(game, 7, "validation")


def test_games_in_threads_do_not_disturb_each_other_or_anybody_else():
    jobs = [(game, seed) for seed in range(4) for game in GAMES]
    alone = [record(*job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda job: record(*job), jobs)) == alone
    random.seed(11)
    expected = [random.random() for _ in range(2)]
    random.seed(11)
    first = random.random()
    env = TextArena("2048-v0")
    env.reset(seed=5)
    env.step(say("[up]"))
    assert [first, random.random()] == expected


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"game": "Sudoko-v0"}, "game: 'Sudoko-v0' is unknown; did you mean Sudoku-v0"),
        ({"game": "Sudoku-v0-raw"}, "game: 'Sudoku-v0-raw' is unknown; did you mean Sudoku-v0"),
        ({"game": "Sudoku-v0", "params": {"clue": 3}}, "params: Sudoku-v0 refused .*clue"),
        ({"game": "TicTacToe-v0"}, "game: TicTacToe-v0 is for several players"),
        ({"game": "Klondike-v0"}, "game: Klondike-v0 .*SyntaxError"),
    ],
)
def test_wrong_arguments_are_named(kwargs, complaint):
    with pytest.raises(EnvError, match=complaint):
        make_env("raygym/TextArena-v0", kwargs)


def test_missing_word_lists_are_told(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: False)
    with pytest.raises(EnvError, match="game: Wordle-v0 needs NLTK's data"):
        make_env("raygym/TextArena-v0", {"game": "Wordle-v0"})
