"""The expected time of a step, simulated before the run: the run's own Scheduler and continuous batching, in virtual
time. No clock is read and nothing sleeps; how long turns are is assumed, and what engines and learners take is told.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf

import numpy as np

from raygym.batching_config import BatchingConfig
from raygym.config import RunConfig
from raygym.schedule import Assignment, Collected, Scheduler, SchedulerOptions
from raygym.simulated_batching import BatchedRequest, ContinuousBatching
from raygym.tasks import TaskCursor, turn_seed, validation_tasks
from raygym.types import EpisodeFailure, EpisodeStatus, FailureKind, Int32Array, Sampling, Task, Trajectory

_MEASURED_STEPS = 2
_MOST_TURNS = 1500
"""Of one simulated step. A run that has more is simulated with fewer engines, and with their share of its episodes."""
_NOTHING = np.zeros(0, np.int32)
_SAMPLING = Sampling()
_TOKEN_IDS = 2**15
"""Drawn below it; only which are equal matters."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is assumed of episodes."""

    prompt_tokens: int
    turns: int | None = None
    """None: as many as the environment allows."""
    tokens_per_turn: int | None = None
    """The mean; None: half of what the environment allows."""
    sigma: float = 0.5
    """Deviation of the logarithm of a turn's length, which is log-normal and cut at what is allowed."""
    observation_tokens: int = 128
    """Added by the environment after each turn but the last."""
    env_s: float = 0.05
    """Seconds of an environment's step."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What the simulation is told."""

    engine: BatchingConfig
    replicas: int
    max_model_len: int
    learn_s: Callable[[list[int]], float]
    """Seconds of the updates made from episodes of these lengths, in tokens."""
    sync_s: float


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Seconds of a step once the run is under way; simulated."""

    generate_s: float
    """That the learners wait for episodes. With `max_staleness`, episodes are played meanwhile, too."""
    learn_s: float
    sync_s: float
    validate_s: float
    """Of one validation, played by itself; 0 for none."""
    generated_tokens: float
    """A step."""
    sequence_tokens: float
    """Of an episode, the mean."""
    preemptions: float
    """Requests that left an engine's batch for want of KV cache, a step."""
    longest_turn_s: float
    """A generation, with its wait for a place in the engine's batch."""
    longest_episode_s: float
    engines: int
    """Simulated; those of the run, or a part of them that is told from."""

    @property
    def step_s(self) -> float:
        """The three parts, without validation."""
        return self.generate_s + self.learn_s + self.sync_s


def simulate_steps(config: RunConfig, costs: StepCosts, workload: Workload) -> TimeSplit:
    """Play some steps of the run: the first ones to get under way, and the mean of the last two is told."""
    number = 1 + config.rollout.max_staleness + _MEASURED_STEPS
    config, costs, whole = _part(config, costs, workload)
    play = _Play(config, costs, workload, steps=number + config.rollout.max_staleness + 1)
    waits, learns, generated, lengths = [], [], [], []
    for step in range(number):
        began_s, made = play.now_s, play.generated_tokens
        collected = play.collect(step)
        waits.append(play.now_s - began_s)
        lengths = [play.tokens_of(t) for group in collected.groups for t in group.trajectories]
        learns.append(costs.learn_s(lengths) * whole)
        play.go_on(learns[-1] + costs.sync_s)
        play.publish(step + 1)
        generated.append(play.generated_tokens - made)
    last = slice(-_MEASURED_STEPS, None)
    return TimeSplit(
        generate_s=float(np.mean(waits[last])),
        learn_s=float(np.mean(learns[last])),
        sync_s=costs.sync_s,
        validate_s=_validate_s(config, costs, workload),
        generated_tokens=float(np.mean(generated[last])) * whole,
        sequence_tokens=float(np.mean(lengths)),
        preemptions=play.preemptions * whole / number,
        longest_turn_s=play.longest_turn_s,
        longest_episode_s=play.longest_episode_s,
        engines=costs.replicas,
    )


def _part(config: RunConfig, costs: StepCosts, workload: Workload) -> tuple[RunConfig, StepCosts, float]:
    """The run, or so many of its engines as is quick to simulate; and how much larger the whole run is."""
    rollout = config.rollout
    allowed = max(env.max_turns or rollout.max_turns for env in config.envs)
    turns = rollout.groups_per_step * rollout.group_size * min(allowed, workload.turns or allowed)
    engines = max(1, min(costs.replicas, costs.replicas * _MOST_TURNS // turns))
    groups = max(1, round(rollout.groups_per_step * engines / costs.replicas))
    if engines == costs.replicas:
        return config, costs, 1.0
    whole = rollout.groups_per_step / groups
    places = max(1, round(rollout.max_concurrent / whole))
    validation = {"tasks": round(config.validation.tasks / whole)}
    changes = {
        "rollout": rollout.model_copy(update={"groups_per_step": groups, "max_concurrent": places}),
        "validation": config.validation.model_copy(update=validation),
    }
    return config.model_copy(update=changes), replace(costs, replicas=engines), whole


def _validate_s(config: RunConfig, costs: StepCosts, workload: Workload) -> float:
    if not config.validation.tasks:
        return 0.0
    play = _Play(config, costs, workload, steps=0)
    play.validate(validation_tasks([(env.label, env.weight) for env in config.envs], config.validation.tasks))
    return play.now_s


@dataclass(slots=True)
class _Episode:
    assignment: Assignment
    token_ids: Int32Array
    turns_left: int
    most_tokens: int
    engine: ContinuousBatching
    began_s: float
    asked_s: float = 0.0
    turn: int = 0
    request: BatchedRequest | None = None
    """That it waits for; None while its environment works."""


@dataclass(slots=True)
class _Play:
    """Engines, scheduler and environments, in virtual time."""

    config: RunConfig
    costs: StepCosts
    workload: Workload
    steps: int
    now_s: float = 0.0
    generated_tokens: int = 0
    longest_turn_s: float = 0.0
    longest_episode_s: float = 0.0
    _scheduler: Scheduler = field(init=False)
    _engines: list[ContinuousBatching] = field(init=False)
    _playing: dict[Assignment, _Episode] = field(default_factory=dict)
    _asked: dict[BatchedRequest, _Episode] = field(default_factory=dict)
    _replies: list[tuple[float, int, _Episode]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)
    _lengths: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rollout = self.config.rollout
        given = {name: getattr(rollout, name) for name in SchedulerOptions.__slots__ if name != "steps"}
        cursor = TaskCursor([(env.label, env.weight) for env in self.config.envs], self.config.seed)
        self._scheduler = Scheduler(cursor, SchedulerOptions(**given, steps=self.steps), lambda: self.now_s)
        self._engines = [ContinuousBatching(self.costs.engine) for _ in range(self.costs.replicas)]

    @property
    def preemptions(self) -> int:
        return sum(engine.preemptions for engine in self._engines)

    def collect(self, step: int) -> Collected:
        """Play until the step's groups are whole."""
        while (collected := self._scheduler.collect_step(step)) is None:
            self._next_event(inf)
        return collected

    def validate(self, tasks: list[Task]) -> None:
        """Play these, one episode each."""
        self._scheduler.add_validation(tasks)
        while self._scheduler.collect_validation() is None:
            self._next_event(inf)

    def go_on(self, seconds: float) -> None:
        """Play for so long."""
        ends_s = self.now_s + seconds
        while self.now_s < ends_s:
            self._next_event(ends_s)

    def publish(self, version: int) -> None:
        """New weights: what is in the KV caches is computed anew."""
        for engine in self._engines:
            engine.change_weights(self.now_s, version)
        self._scheduler.set_version(version)

    def tokens_of(self, trajectory: Trajectory) -> int:
        """Its length."""
        return self._lengths[trajectory.group_id, trajectory.episode]

    def _next_event(self, ends_s: float) -> None:
        for assignment in self._scheduler.start():
            self._begin(assignment)
        times = [due for engine in self._engines if (due := engine.next_event_s()) is not None]
        due_s = min([*times, ends_s, *(self._replies[0][:1] if self._replies else ())])
        assert due_s < inf, "nothing is playing, and a step is waited for"
        self.now_s = max(self.now_s, due_s)
        for engine in self._engines:
            for request in engine.advance(self.now_s):
                if (episode := self._asked.pop(request, None)) is not None:
                    self._answered(request, episode)
        while self._replies and self._replies[0][0] <= self.now_s:
            if (episode := heapq.heappop(self._replies)[2]).assignment in self._playing:
                self._ask(episode)
        for assignment in self._scheduler.obsolete():
            self._cancel(self._playing.pop(assignment))

    def _cancel(self, episode: _Episode) -> None:
        if episode.request is not None:
            episode.engine.cancel(self.now_s, episode.request)
            self._asked.pop(episode.request, None)
        self._scheduler.finish(episode.assignment, EpisodeFailure(FailureKind.CANCELLED, "not wanted any more"))

    def _begin(self, assignment: Assignment) -> None:
        env = next(env for env in self.config.envs if env.label == assignment.task.env)
        allowed = env.max_turns or self.config.rollout.max_turns
        rng = np.random.default_rng(assignment.task.seed)
        episode = self._playing[assignment] = _Episode(
            assignment,
            rng.integers(0, _TOKEN_IDS, self.workload.prompt_tokens, np.int32),
            min(allowed, self.workload.turns or allowed),
            env.max_tokens_per_turn or self.config.rollout.max_tokens_per_turn,
            min(self._engines, key=lambda engine: engine.running + engine.waiting),
            self.now_s,
        )
        self._ask(episode)

    def _ask(self, episode: _Episode) -> None:
        assignment, load = episode.assignment, self.workload
        seed = turn_seed(self.config.seed, assignment.task, assignment.episode, assignment.attempt, episode.turn)
        rng = np.random.default_rng(seed)
        mean = load.tokens_per_turn or max(1, episode.most_tokens // 2)
        drawn = mean * np.exp(load.sigma * rng.standard_normal() - load.sigma**2 / 2)
        room = self.costs.max_model_len - len(episode.token_ids)
        length = int(np.clip(round(drawn), 1, min(episode.most_tokens, room)))
        made = rng.integers(0, _TOKEN_IDS, length, np.int32)
        episode.asked_s = self.now_s
        episode.request = episode.engine.submit(self.now_s, episode.token_ids, made)
        self._asked[episode.request] = episode

    def _answered(self, request: BatchedRequest, episode: _Episode) -> None:
        episode.request = None
        episode.turn += 1
        episode.turns_left -= 1
        episode.token_ids = request.token_ids
        self.generated_tokens += request.length
        self.longest_turn_s = max(self.longest_turn_s, self.now_s - episode.asked_s)
        observed = len(request.token_ids) + self.workload.observation_tokens
        if episode.turns_left and observed < self.costs.max_model_len:
            observation = np.full(self.workload.observation_tokens, episode.turn, np.int32)
            episode.token_ids = np.concatenate([request.token_ids, observation])
            heapq.heappush(self._replies, (self.now_s + self.workload.env_s, next(self._order), episode))
            return
        assignment = episode.assignment
        del self._playing[assignment]
        self.longest_episode_s = max(self.longest_episode_s, self.now_s - episode.began_s)
        self._lengths[assignment.group_id, assignment.episode] = len(request.token_ids)
        self._scheduler.finish(assignment, finished_episode(assignment))


def finished_episode(assignment: Assignment, metrics: dict[str, float] | None = None) -> Trajectory:
    """A simulated episode that came to its end, without tokens; rewards differ within a group, so none is replaced.

    `metrics`: what is asked of it later.
    """
    return Trajectory(
        task=assignment.task,
        group_id=assignment.group_id,
        episode=assignment.episode,
        attempt=assignment.attempt,
        status=EpisodeStatus.TERMINATED,
        token_ids=_NOTHING,
        loss_mask=_NOTHING.astype(np.bool_),
        logprobs=_NOTHING.astype(np.float32),
        weight_versions=_NOTHING,
        turns=(),
        reward=float(assignment.episode % 2),
        messages=(),
        sampling=_SAMPLING,
        metrics=metrics or {},
    )
