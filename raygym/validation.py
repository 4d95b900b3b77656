"""Validation as a stream of its own: one version plays the held-out tasks while the next step is made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.metrics import validation_metrics
from raygym.run_files import HeldRow, RunFiles
from raygym.schedule import Collected
from raygym.tasks import validation_tasks
from raygym.types import Task

# For the row of one that is over already; what plays an abandoned one has ended by then.
_ABANDONED_WITHIN_S = 60.0
Play = Callable[[list[Task], Callable[[str], None], float], tuple[Collected, float]]
"""Plays tasks within a deadline in seconds, telling its progress; what came of it, and the seconds it took."""


class ValidationStream:
    """The validations of one run, one at a time, each in a thread beside the caller.

    Whoever changes the engines' weights calls `wait` first: then every token of a validation is of its version. The
    row of the validated step is held back until the result is there.
    """

    def __init__(
        self, config: RunConfig, play: Play, files: RunFiles, console: RunConsole, progress: Callable[[str], None]
    ) -> None:
        """Nothing is played yet. `progress` is called from the thread."""
        self._steps = config.steps
        self._options = config.validation
        envs = [(env.label, env.weight) for env in config.envs]
        self._tasks = validation_tasks(envs, config.validation.tasks)
        self._play = play
        self._files = files
        self._console = console
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="validation")
        self._playing: Future[None] | None = None
        self.rewards: dict[int, float] = {}
        """Mean reward by step, of each that is over and had one."""

    def due(self, step: int) -> bool:
        """Whether the policy is validated after `step` steps: at the start, at the end, and every so often."""
        every = self._options.every
        return bool(self._tasks) and (step in (0, self._steps) or (every > 0 and step % every == 0))

    def start(self, step: int, row: HeldRow) -> None:
        """Begin to validate the weights that are served now, and return at once.

        Args:
            step: after so many steps; it is their version, too.
            row: what else is known of that step; it is written with the result.
        """
        assert self._playing is None, "the validation before was not waited for"
        self._playing = self._thread.submit(self._validate, step, row)

    def wait(self) -> None:
        """Return when the validation that was started last is over; at once where there is none.

        Raises:
            RolloutStopped: it cannot be played.
        """
        playing, self._playing = self._playing, None
        if playing is not None:
            # No deadline here: `play` has one.
            playing.result()

    def abandon(self) -> None:
        """Return when nothing of it runs any more, whatever became of it. Whoever plays it must have been stopped, and
        nothing can be started after this."""
        self._thread.shutdown(wait=False)
        playing, self._playing = self._playing, None
        if playing is not None:
            wait_for([playing], _ABANDONED_WITHIN_S)

    def _validate(self, step: int, row: HeldRow) -> None:
        collected, seconds = self._play(self._tasks, self._progress, self._options.deadline_s)
        metrics = validation_metrics(collected) | {"time/validate_s": seconds}
        self._files.rollouts(step, collected, kind="validation")
        row.write(metrics)
        if "val/reward" in metrics:
            self.rewards[step] = metrics["val/reward"]
        self._console.validation(step, metrics)
