"""A whole training run in virtual time: engines, EnvRunners, the manager with the run's own Scheduler, learners."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

from harness.virtual_engines import PlayedEpisode, VirtualEngines, Workload
from harness.virtual_manager import ManagerCost, VirtualManager
from harness.virtual_time import VirtualTime
from raygym.batching_config import BatchingConfig
from raygym.schedule import Assignment, Collected, Scheduler, SchedulerOptions
from raygym.tasks import TaskCursor
from raygym.types import Task

ENV = "simulated"


@dataclass(frozen=True, slots=True)
class ClusterSetup:
    """One run. An engine has one GPU; the learners' GPUs are others, and grow with the engines'."""

    engine: BatchingConfig
    workload: Workload
    manager: ManagerCost
    gpus: int
    places_per_gpu: int = 100
    """Episodes that may run at once, for each engine."""
    batches_in_places: float = 1.0
    """Places over episodes of a step."""
    max_staleness: int = 1
    order: Literal["task", "completion"] = "task"
    runners: int = 1
    learn_s: float = 0.0
    """Of a step's updates and the way of the new weights to the engines."""
    warm_up: int = 2
    steps: int = 3
    """That are measured after those."""

    @property
    def places(self) -> int:
        """Episodes that may run at once."""
        return self.gpus * self.places_per_gpu

    @property
    def groups_per_step(self) -> int:
        """Of a batch."""
        return max(1, round(self.places / self.batches_in_places / self.workload.group_size))


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """What became of it, from the first measured step's beginning to the last one's end; times are virtual."""

    seconds: float
    episodes: int
    """That ended."""
    tokens: int
    turns: int
    delivered: int
    """Episodes of the batches that were collected meanwhile."""
    empty_places: float
    """Share of the places' time without an episode."""
    learner_waits: float
    """Share of the time that learners wait for a batch."""
    staleness_mean: float
    """Over the tokens of the batches: versions between the one that made it and the one that is trained."""
    staleness_max: float
    straggler: float
    """Time of a batch's slowest episode over that of its median one; the median over the steps."""
    manager_share: float
    """Of the time that its process works."""
    manager_wait_s: float
    """The longest that anything waited for the manager, in the whole run."""
    preemptions: int
    scheduler_us: float
    """Real time of the scheduler, microseconds an episode: the median over the answers of the whole run."""
    most_at_once: int
    """Episodes."""
    begun: int
    """Episodes handed out in the whole run, of which `ended` came to their end and `at_end` had not when it ended."""
    ended: int
    at_end: int


@dataclass(slots=True)
class _Totals:
    """Counters at one moment."""

    time_s: float
    episodes: int
    tokens: int
    turns: int
    place_s: float
    busy_s: float
    preemptions: int


@dataclass(slots=True)
class _Trainer:
    """Collects, learns, publishes, and so on; it keeps what is asked of the batches."""

    setup: ClusterSetup
    clock: VirtualTime
    engines: VirtualEngines
    manager: VirtualManager = field(init=False)
    version: int = 0
    wanted_s: list[float] = field(default_factory=list)
    """When each step was asked for."""
    whole_s: list[float] = field(default_factory=list)
    stale_tokens: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    stalest: list[float] = field(default_factory=list)
    stragglers: list[float] = field(default_factory=list)

    def ask(self) -> None:
        self.wanted_s.append(self.clock.now_s)
        self.manager.collect(self.version, self.version)

    def collected(self, step: int, collected: Collected) -> None:
        self.whole_s.append(self.clock.now_s)
        played = [t.metrics for group in collected.groups for t in group.trajectories]
        assert len(played) == self.setup.groups_per_step * self.setup.workload.group_size
        tokens = sum(episode["tokens"] for episode in played)
        self.tokens.append(tokens)
        self.stale_tokens.append(step * tokens - sum(episode["version_tokens"] for episode in played))
        self.stalest.append(step - min(episode["first_version"] for episode in played))
        seconds = [episode["ended_s"] - episode["began_s"] for episode in played]
        self.stragglers.append(max(seconds) / median(seconds))
        self.clock.after(self.setup.learn_s, self.publish)

    def publish(self) -> None:
        self.version += 1
        self.engines.change_weights(self.version)
        self.ask()


def simulate_cluster(setup: ClusterSetup) -> ClusterRun:
    """Play the run. The same setup gives the same, but for `scheduler_us`."""
    clock = VirtualTime()
    steps = setup.warm_up + setup.steps
    options = SchedulerOptions(
        groups_per_step=setup.groups_per_step,
        group_size=setup.workload.group_size,
        # The last steps are not collected: the stream has no end while it is measured.
        steps=steps + setup.max_staleness + 2,
        max_concurrent=setup.places,
        max_staleness=setup.max_staleness,
        order=setup.order,
    )
    scheduler = Scheduler(TaskCursor([(ENV, 1.0)], setup.workload.seed), options, lambda: clock.now_s)
    engines = VirtualEngines(clock, setup.engine, setup.workload, _nobody, setup.gpus, setup.runners)
    trainer = _Trainer(setup, clock, engines)
    manager = VirtualManager(clock, scheduler, engines, setup.manager, trainer.collected, setup.runners)
    trainer.manager = manager

    def totals() -> _Totals:
        return _Totals(
            clock.now_s,
            manager.episodes_played,
            engines.tokens,
            engines.turns,
            manager.place_s_until_now(),
            manager.busy_s_until_now(),
            engines.preemptions,
        )

    trainer.ask()
    clock.run_until(lambda: trainer.version >= setup.warm_up)
    first = totals()
    clock.run_until(lambda: trainer.version >= steps)
    last = totals()
    seconds = last.time_s - first.time_s
    measured = slice(setup.warm_up, steps)
    waited = [whole - wanted for wanted, whole in zip(trainer.wanted_s, trainer.whole_s, strict=False)][measured]
    return ClusterRun(
        seconds=seconds,
        episodes=last.episodes - first.episodes,
        tokens=last.tokens - first.tokens,
        turns=last.turns - first.turns,
        delivered=setup.steps * setup.groups_per_step * setup.workload.group_size,
        empty_places=1 - (last.place_s - first.place_s) / (seconds * setup.places),
        learner_waits=sum(waited) / seconds,
        staleness_mean=sum(trainer.stale_tokens[measured]) / sum(trainer.tokens[measured]),
        staleness_max=max(trainer.stalest[measured]),
        straggler=median(trainer.stragglers[measured]),
        manager_share=(last.busy_s - first.busy_s) / seconds,
        manager_wait_s=manager.longest_wait_s,
        preemptions=last.preemptions - first.preemptions,
        scheduler_us=median(manager.scheduler_s) * 1e6,
        most_at_once=manager.most_running,
        begun=manager.episodes_begun,
        ended=manager.episodes_ended,
        at_end=scheduler.running,
    )


def engine_alone(engine: BatchingConfig, workload: Workload, places: int, episodes: int) -> tuple[float, float]:
    """Tokens and episodes a second of one engine with so many places that are never empty and weights that stay.

    Args:
        engine: its costs.
        workload: what is played.
        places: episodes at once.
        episodes: that are measured, after as many as there are places.
    """
    clock = VirtualTime()
    ended = 0

    def go_on(episode: PlayedEpisode) -> None:
        nonlocal ended
        ended += 1
        begin(episode.assignment.episode)

    begun = 0

    def begin(_: int = 0) -> None:
        nonlocal begun
        group, episode = divmod(begun, workload.group_size)
        engines.begin(Assignment(str(group), Task(group, ENV, group), episode, 0), 0)
        begun += 1

    engines = VirtualEngines(clock, engine, workload, go_on)
    for _ in range(places):
        begin()
    clock.run_until(lambda: ended >= places)
    started_s, tokens = clock.now_s, engines.tokens
    clock.run_until(lambda: ended >= places + episodes)
    seconds = clock.now_s - started_s
    return (engines.tokens - tokens) / seconds, episodes / seconds


def batch_s(setup: ClusterSetup, tokens_per_s: float) -> float:
    """Seconds that the engines need at least for a batch, if one of them makes so many tokens a second."""
    lengths = [
        length
        for group in range(min(setup.groups_per_step, 256))
        for episode in range(setup.workload.group_size)
        for length in setup.workload.lengths(group, episode)
    ]
    tokens = fmean(lengths) * setup.workload.turns * setup.groups_per_step * setup.workload.group_size
    return tokens / (tokens_per_s * setup.gpus)


def runners_for(gpus: int, gpus_per_runner: int = 64) -> int:
    """EnvRunners of a cluster: none of them is to be what is short."""
    return math.ceil(gpus / gpus_per_runner)


def _nobody(episode: PlayedEpisode) -> None:
    raise AssertionError(f"nobody waits for {episode}")
