"""Single-player games of the package TextArena, with the game's own rules and reward.

    envs:
      - {id: raygym/TextArena-v0, kwargs: {game: GuessTheNumber-v0, params: {max_number: 50}}}

Why TextArena and not verifiers: it brings four small packages where verifiers 0.4 brings two dozen, and verifiers asks
for one exact version of mcp and for an older openai than vLLM works with; verifiers' own games are TextArena's.

Games: those for one player that need neither a network nor another model: 2048, Bandit, Blackjack, Countdown,
Crosswords, Cryptarithm, FifteenPuzzle, FrozenLake, GuessTheNumber, LightsOut, LogicPuzzle, Mastermind, Minesweeper,
PegJump, RushHour, Secretary, Set, Slitherlink, Sokoban, Sudoku, ThreeCardMonte, TowerOfHanoi, with their variants.
Hangman, WordLadder, WordSearch and Wordle need NLTK's word lists on the machine, GuessWho and TwentyQuestions another
model, and Klondike and UltimateTexasHoldem of 0.7.4 are no valid Python 3.11: each is told when it is made.

Data: drawn by the game from the task's seed: training uses even seeds, validation odd ones. Where a game has few tasks
(GuessTheNumber has 20 numbers, Countdown and Cryptarithm one task unless told), both splits have the same ones.

Reward: the game's own, at its end, from -1 to 1. An invalid move is answered with what is wrong with it; a second one
without a valid move between ends the game with what the game gives for that. Each turn brings only what is new, so a
conversation holds each board once. `rollout.max_turns` must reach the game's end, or no reward is given.
"""

from __future__ import annotations

import difflib
import importlib
import random
from functools import cache
from typing import Any

from raygym.env import ChatEnv
from raygym.envs.generated import split_seed
from raygym.envs.own_random import drawing_from, redirect
from raygym.types import Message

try:
    import textarena
    from textarena.envs.registration import ENV_REGISTRY
    from textarena.wrappers import ActionFormattingWrapper
except ImportError as error:
    raise ImportError(
        f"raygym/TextArena-v0 needs the package textarena: pip install 'raygym[envs]' ({error})"
    ) from error

# The variants of a game that differ only in how observations are put together, which is done here.
_WRAPPED = ("-raw", "-train")


class TextArena(ChatEnv):
    """One game, played alone."""

    def __init__(self, game: str, params: dict[str, Any] | None = None) -> None:
        """Make the game.

        Args:
            game: TextArena's id, such as Sudoku-v0 or Mastermind-v0-hard.
            params: what the game's constructor takes beyond what the id says.

        Raises:
            ValueError: there is no such game for one player, it refuses `params`, or it lacks something.
        """
        if game not in ENV_REGISTRY or game.endswith(_WRAPPED):
            games = [name for name in ENV_REGISTRY if not name.endswith(_WRAPPED)]
            near = difflib.get_close_matches(str(game), games, n=3) or ["GuessTheNumber-v0", "Sudoku-v0", "2048-v0"]
            raise ValueError(f"game: {game!r} is unknown; did you mean {' or '.join(near)}?")
        self._name, self._params = game, dict(params or {})
        self._random = random.Random(0)
        self._game = self._make()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a game: its rules and its first board."""
        super().reset(seed=seed)
        number = split_seed(int(self.np_random.integers(2**31)) if seed is None else seed, options)
        self._random.seed(number)
        # Anew, since some games draw in their constructor.
        self._game = self._make()
        with drawing_from(self._random):
            self._game.reset(num_players=1, seed=number)
        _accept_swapped_arguments(self._game.state)
        return self._news(), {}

    def step(self, action: Message) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one move."""
        with drawing_from(self._random):
            done, _ = self._game.step(action["content"] or "")
        news = self._news()
        if not done:
            return news or "Go on.", 0.0, False, False, {}
        rewards, infos = self._game.close()
        reward, info = float((rewards or {}).get(0, 0.0)), infos[0]
        metrics = {"moves": float(info["turn_count"]), "invalid_move": float(info["invalid_move"])}
        return f"{news}\n{info.get('reason') or ''}".strip(), reward, True, False, {"metrics": metrics}

    def close(self) -> None:
        """Games hold nothing that must be given back."""

    def _make(self) -> Any:
        return _make(self._name, self._params, self._random)

    def _news(self) -> str:
        _, messages = self._game.get_observation()
        # The move itself comes back as well; three games of 0.7.4 give the player's number in the place of its text.
        echo = textarena.ObservationType.PLAYER_ACTION
        news = [text.strip() for _, text, kind in messages if kind is not echo and isinstance(text, str)]
        return "\n\n".join(text for text in news if text)


def _make(game: str, params: dict[str, Any], generator: random.Random) -> Any:
    try:
        _load(ENV_REGISTRY[game].entry_point.partition(":")[0])
        with drawing_from(generator):
            made = textarena.make(f"{game}-raw", **params)
    except TypeError as error:
        raise ValueError(f"params: {game} refused {params}: {error}") from error
    except (ImportError, SyntaxError, ValueError, AssertionError, OSError, KeyError, IndexError) as error:
        raise ValueError(f"game: {game} with {params} cannot be made: {type(error).__name__}: {error}") from error
    except LookupError as error:  # what NLTK raises, and not one of its kinds above
        raise ValueError(
            f"game: {game} needs NLTK's data, which this machine lacks; run `python -m nltk.downloader words "
            "averaged_perceptron_tagger_eng` where there is a network, or set NLTK_DATA to a copy"
        ) from error
    if not _is_for_one(type(made)):
        raise ValueError(f"game: {game} is for several players; expected a game for one")
    if ActionFormattingWrapper in (ENV_REGISTRY[game].default_wrappers or ()):
        return ActionFormattingWrapper(made)
    return made


@cache
def _load(module: str) -> None:
    importlib.import_module(module)
    redirect("textarena")


def _is_for_one(game: type) -> bool:
    # A game makes its state in `reset`, which for some takes seconds: reading which kind it makes takes none.
    functions = (member for kind in game.__mro__ for member in vars(kind).values())
    return any("SinglePlayerState" in f.__code__.co_names for f in functions if hasattr(f, "__code__"))


def _accept_swapped_arguments(state: Any) -> None:
    # Four games of 0.7.4 (Countdown, Cryptarithm, Slitherlink, ThreeCardMonte) give (reward, reason), and the text
    # would be the reward.
    original = state.set_invalid_move

    def set_invalid_move(reason: Any, reward: Any = -1.0) -> None:
        original(*((reward, reason) if isinstance(reward, str) else (reason, reward)))

    state.set_invalid_move = set_invalid_move
