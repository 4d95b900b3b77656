"""The RolloutManager in virtual time: the run's own Scheduler, behind a process that does one thing after the other.

What the process does is `actors/rollout_manager.py` and `raygym/episode_exchange.py` said again without an event loop:
one open call to each EnvRunner, which answers with all that has ended there; what begins in its place goes out with the
next call; a quarter more episodes are handed out than may run, and wait in the runner for a place. How long each of
that takes the process is told (`ManagerCost`). So a manager that has too much to do answers late, its answers carry
more, and places stay empty.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.virtual_engines import PlayedEpisode, VirtualEngines
from harness.virtual_time import VirtualTime
from raygym.schedule import Assignment, Collected, Scheduler
from raygym.time_split import finished_episode
from raygym.types import Trajectory

AHEAD = 0.25
"""As the RolloutManager's."""
CALL_WAY_S = 0.001
"""Of a remote call or its answer, from process to process; assumed."""


@dataclass(frozen=True, slots=True)
class ManagerCost:
    """Processor time of the manager's process, in seconds, its scheduler included."""

    call_s: float
    """Of a call to a runner and its answer, whatever they carry."""
    begin_s: float
    """Of an episode that is handed out."""
    end_s: float
    """Of an episode that has ended."""

    @property
    def episode_s(self) -> float:
        """Of an episode in calls that carry many."""
        return self.begin_s + self.end_s

    def times(self, factor: float) -> ManagerCost:
        """A process that is so much slower; or the share of one, in a cluster so much larger, of each of its parts."""
        return ManagerCost(self.call_s * factor, self.begin_s * factor, self.end_s * factor)


@dataclass(slots=True)
class _Runner:
    running: int = 0
    load: int = 0
    """That the manager has handed to it and has not heard of again."""
    waiting: deque[Assignment] = field(default_factory=deque)
    finished: list[PlayedEpisode] = field(default_factory=list)
    call_is_open: bool = False


Work = Callable[[], tuple[float, Callable[[], None]]]
"""Something for the process to do: the seconds that it takes, and what comes of it then."""


@dataclass(slots=True)
class VirtualManager:
    """Scheduler and EnvRunners."""

    clock: VirtualTime
    scheduler: Scheduler
    engines: VirtualEngines
    cost: ManagerCost
    collected: Callable[[int, Collected], None]
    """Called with each step that was asked for, when it is whole."""
    runners: int = 1
    scheduler_s: list[float] = field(default_factory=list)
    """Of each answer: real seconds that the scheduler took for each episode in it, and for what began in its place. By
    the wall clock, since asking for the processor's can take longer; so only the median means something."""
    busy_s: float = 0.0
    """Virtual seconds of all that the process has begun to do."""
    episodes_begun: int = 0
    episodes_ended: int = 0
    """That the scheduler was told of."""
    episodes_played: int = 0
    """That have ended in the runners."""
    running: int = 0
    """Episodes that have a place now."""
    place_s: float = 0.0
    """Seconds that episodes have had places, all together, up to the last change."""
    longest_wait_s: float = 0.0
    """Of anything that waited for the process."""
    most_running: int = 0
    _runners: list[_Runner] = field(init=False)
    _places: int = field(init=False)
    _work: deque[tuple[float, Work]] = field(default_factory=deque)
    _is_busy: bool = False
    _free_s: float = 0.0
    _start_s: float = 0.0
    _wanted_step: int | None = None
    _changed_s: float = 0.0

    def __post_init__(self) -> None:
        self._runners = [_Runner() for _ in range(self.runners)]
        self._places = math.ceil(self.scheduler.max_concurrent / self.runners)
        self.scheduler.ahead = math.ceil(AHEAD * self.scheduler.max_concurrent)
        self.engines.ended = self._episode_ended

    def collect(self, step: int, version: int) -> None:
        """The engines have `version`, and the trainer wants `step`."""

        def work() -> tuple[float, Callable[[], None]]:
            self._wanted_step = step
            self.scheduler.set_version(version)
            return self._turn_over(self.cost.call_s, -1)

        self._do(work)

    def place_s_until_now(self) -> float:
        """`place_s` up to this moment."""
        return self.place_s + self.running * (self.clock.now_s - self._changed_s)

    def busy_s_until_now(self) -> float:
        """Virtual seconds that the process has worked."""
        return self.busy_s - max(0.0, self._free_s - self.clock.now_s)

    def _do(self, work: Work) -> None:
        self._work.append((self.clock.now_s, work))
        if not self._is_busy:
            self._next_work()

    def _next_work(self) -> None:
        self._is_busy = bool(self._work)
        if self._work:
            asked_s, work = self._work.popleft()
            self.longest_wait_s = max(self.longest_wait_s, self.clock.now_s - asked_s)
            seconds, effect = work()
            self.busy_s += seconds
            self._free_s = self.clock.now_s + seconds
            self.clock.after(seconds, self._worked, effect)

    def _worked(self, effect: Callable[[], None]) -> None:
        effect()
        self._next_work()

    def _take_answer(self, number: int, finished: list[PlayedEpisode]) -> tuple[float, Callable[[], None]]:
        runner = self._runners[number]
        outcomes = [_trajectory(episode) for episode in finished]
        began_s = time.perf_counter()
        for episode, outcome in zip(finished, outcomes, strict=True):
            self.scheduler.finish(episode.assignment, outcome)
        finish_s = time.perf_counter() - began_s
        runner.load -= len(finished)
        self.episodes_ended += len(finished)
        done = self._turn_over(self.cost.call_s + self.cost.end_s * len(finished), number)
        self.scheduler_s.append((finish_s + self._start_s) / len(finished))
        return done

    def _turn_over(self, seconds: float, answered: int) -> tuple[float, Callable[[], None]]:
        """What the manager does after all that it hears: begin what may begin, and look whether the step is whole."""
        scheduler, collected, step = self.scheduler, None, self._wanted_step
        began_s = time.perf_counter()
        scheduler.expire()
        assert not scheduler.obsolete(), "nothing is given up in these runs"
        started = scheduler.start()
        if step is not None and (collected := scheduler.collect_step(step)) is not None:
            started += scheduler.start()
        self._start_s = time.perf_counter() - began_s
        self.episodes_begun += len(started)
        begin: dict[int, list[Assignment]] = {}
        for assignment in started:
            number = min(range(self.runners), key=lambda index: self._runners[index].load)
            self._runners[number].load += 1
            begin.setdefault(number, []).append(assignment)
        if answered >= 0:
            begin.setdefault(answered, [])  # its call has to be opened again
        # That of the runner that answered is the same call.
        seconds += self.cost.call_s * (len(begin) - (answered >= 0)) + self.cost.begin_s * len(started)
        if collected is not None:
            self._wanted_step = None

        def effect() -> None:
            for number, assignments in begin.items():
                self.clock.after(CALL_WAY_S, self._called, number, assignments)
            if collected is not None:
                assert step is not None
                self.collected(step, collected)

        return seconds, effect

    def _called(self, number: int, begin: list[Assignment]) -> None:
        """A call has come to its runner."""
        runner = self._runners[number]
        runner.waiting.extend(begin)
        runner.call_is_open = True
        self._fill(number)
        self._answer(number)

    def _fill(self, number: int) -> None:
        runner = self._runners[number]
        while runner.waiting and runner.running < self._places:
            runner.running += 1
            self._place_changed(1)
            self.engines.begin(runner.waiting.popleft(), number)

    def _episode_ended(self, episode: PlayedEpisode) -> None:
        runner = self._runners[episode.runner]
        runner.running -= 1
        self._place_changed(-1)
        self.episodes_played += 1
        runner.finished.append(episode)
        self._fill(episode.runner)
        self._answer(episode.runner)

    def _answer(self, number: int) -> None:
        runner = self._runners[number]
        if runner.call_is_open and runner.finished:
            finished, runner.finished, runner.call_is_open = runner.finished, [], False
            self.clock.after(CALL_WAY_S, self._do, lambda: self._take_answer(number, finished))

    def _place_changed(self, by: int) -> None:
        self.place_s = self.place_s_until_now()
        self._changed_s = self.clock.now_s
        self.running += by
        self.most_running = max(self.most_running, self.running)


def _trajectory(episode: PlayedEpisode) -> Trajectory:
    """An episode that came to its end; what is asked of it later is in `metrics`."""
    return finished_episode(
        episode.assignment,
        metrics={
            "began_s": episode.began_s,
            "ended_s": episode.ended_s,
            "tokens": episode.tokens,
            "first_version": episode.first_version,
            "version_tokens": episode.version_tokens,
        },
    )
