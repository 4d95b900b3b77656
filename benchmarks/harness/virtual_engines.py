"""Simulated engines on virtual time, and the episodes that are played on them: the run's own model of batching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from harness.virtual_time import VirtualTime
from raygym.architecture import read_architecture
from raygym.batching_config import BatchingConfig
from raygym.memory_estimate import GIB, EngineSetup, estimate_engine
from raygym.model_shape import read_shape
from raygym.roofline import H100, engine_costs
from raygym.schedule import Assignment
from raygym.simulated_batching import BatchedRequest, ContinuousBatching
from raygym.types import Int32Array

MODEL = "Qwen/Qwen2.5-7B-Instruct"
_GPU_GIB = 80
_DRAWN = 2**18


def gpu_engine() -> BatchingConfig:
    """One H100 with a policy of 7 B parameters in bfloat16, as `raygym config check` estimates it; not measured."""
    architecture = read_architecture(MODEL, None)
    assert architecture is not None, MODEL
    shape = read_shape(architecture.config)
    setup = EngineSetup(shape, 2, max_model_len=8192, max_num_seqs=256, max_num_batched_tokens=8192)
    return engine_costs(setup, H100, estimate_engine(setup, _GPU_GIB * GIB).kv_cache)


@dataclass(frozen=True)
class Workload:
    """What episodes are like. Lengths are a function of task and episode, so all runs play the same."""

    turns: int = 3
    prompt_tokens: int = 512
    tokens_per_turn: int = 320
    """The mean before the cut."""
    sigma: float = 0.7
    """Deviation of the logarithm of a turn's length."""
    most_tokens: int = 1024
    observation_tokens: int = 64
    """Added by the environment after each turn but the last."""
    env_s: float = 0.1
    """Seconds of an environment's step."""
    group_size: int = 8
    seed: int = 0

    def lengths(self, task: int, episode: int) -> list[int]:
        """Tokens of each turn."""
        first = (task * self.group_size + episode) * self.turns % _DRAWN
        return self._drawn[first : first + self.turns]

    @cached_property
    def _drawn(self) -> list[int]:
        normal = np.random.default_rng(self.seed).standard_normal(_DRAWN + self.turns)
        tokens = self.tokens_per_turn * np.exp(self.sigma * normal - self.sigma**2 / 2)
        lengths: list[int] = np.clip(np.rint(tokens), 1, self.most_tokens).astype(int).tolist()
        return lengths

    @cached_property
    def observation(self) -> Int32Array:
        """Its tokens; only which prompts are equal matters, and what comes before them differs."""
        return np.full(self.observation_tokens, 1, np.int32)


@dataclass(slots=True, eq=False)
class PlayedEpisode:
    """One attempt, from the moment that it has a place."""

    assignment: Assignment
    runner: int
    engine: int
    began_s: float
    lengths: list[int]
    token_ids: Int32Array
    turn: int = 0
    asked_version: int = 0
    first_version: int = -1
    """Of its first token."""
    version_tokens: int = 0
    """Sum of the weight versions of its tokens."""
    ended_s: float = 0.0

    @property
    def tokens(self) -> int:
        """That the policy made, once it has ended."""
        return sum(self.lengths)

    def made(self, request: BatchedRequest) -> None:
        """Take in what the turn's tokens were made by."""
        version, before = self.asked_version, 0
        for count, after in request.changes:
            self._of_version(version, count - before)
            version, before = after, count
        self._of_version(version, request.length - before)

    def _of_version(self, version: int, tokens: int) -> None:
        if tokens and self.first_version < 0:
            self.first_version = version
        self.version_tokens += version * tokens


@dataclass(slots=True)
class VirtualEngines:
    """N engines, and the episodes of R EnvRunners on them.

    As in `TurnExchange`, a runner sends an episode to the engine which has the fewest of its own turns at that moment.
    """

    time: VirtualTime
    config: BatchingConfig
    workload: Workload
    ended: Callable[[PlayedEpisode], None]
    """Called when an episode is over."""
    number: int = 1
    runners: int = 1
    version: int = 0
    tokens: int = 0
    """Of turns that are whole, so far."""
    turns: int = 0
    _engines: list[ContinuousBatching] = field(init=False)
    _due_s: list[float | None] = field(init=False)
    _asked: dict[BatchedRequest, PlayedEpisode] = field(default_factory=dict)
    _turns_of: np.ndarray = field(init=False)
    """Of each runner, on each engine."""
    _numbers: int = 1

    def __post_init__(self) -> None:
        self._engines = [ContinuousBatching(self.config) for _ in range(self.number)]
        self._due_s = [None] * self.number
        self._turns_of = np.zeros((self.runners, self.number), np.int32)

    @property
    def batched(self) -> int:
        """Turns in the engines' batches now."""
        return sum(engine.running for engine in self._engines)

    @property
    def preemptions(self) -> int:
        """So far."""
        return sum(engine.preemptions for engine in self._engines)

    def begin(self, assignment: Assignment, runner: int) -> None:
        """Play an episode."""
        task, episode = assignment.task.index, assignment.episode
        # Twins begin with the same prompt.
        prompt = np.full(self.workload.prompt_tokens, 2 * task, np.int32)
        engine = int(self._turns_of[runner].argmin())
        lengths = self.workload.lengths(task, episode)
        self._ask(PlayedEpisode(assignment, runner, engine, self.time.now_s, lengths, prompt))

    def change_weights(self, version: int) -> None:
        """All of them at this moment; what is cached is computed anew."""
        self.version = version
        for index, engine in enumerate(self._engines):
            engine.change_weights(self.time.now_s, version)
            self._watch(index)

    def _ask(self, episode: PlayedEpisode) -> None:
        self._numbers += 1
        made = np.full(episode.lengths[episode.turn], 2 * self._numbers + 1, np.int32)
        self._turns_of[episode.runner, episode.engine] += 1
        episode.asked_version = self.version
        request = self._engines[episode.engine].submit(self.time.now_s, episode.token_ids, made)
        self._asked[request] = episode
        self._watch(episode.engine)

    def _watch(self, index: int) -> None:
        due_s = self._engines[index].next_event_s()
        if due_s != self._due_s[index]:
            self._due_s[index] = due_s
            if due_s is not None:
                self.time.at(due_s, self._advance, index, due_s)

    def _advance(self, index: int, due_s: float) -> None:
        if self._due_s[index] != due_s:
            return  # something else happens first since then
        self._due_s[index] = None
        for request in self._engines[index].advance(self.time.now_s):
            self._answered(request)
        self._watch(index)

    def _answered(self, request: BatchedRequest) -> None:
        episode = self._asked.pop(request)
        self._turns_of[episode.runner, episode.engine] -= 1
        episode.made(request)
        episode.turn += 1
        self.tokens += request.length
        self.turns += 1
        if episode.turn < len(episode.lengths):
            episode.token_ids = np.concatenate([request.token_ids, self.workload.observation])
            self.time.after(self.workload.env_s, self._ask, episode)
            return
        episode.ended_s = self.time.now_s
        self.ended(episode)
