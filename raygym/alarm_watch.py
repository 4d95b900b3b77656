"""What an alarm does to a run: its line, its folder with the step's trajectories, and the end of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raygym.alarms import Alarm, Alarms, AlarmStop, not_finite
from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.run_files import RunFiles
from raygym.schedule import Collected


class AlarmWatch:
    """The alarms of one run, with what people see of them."""

    def __init__(self, config: RunConfig, files: RunFiles, console: RunConsole) -> None:
        self._alarms = Alarms(config)
        self._files = files
        self._console = console
        self.stop: AlarmStop | None = None
        """Why the run has to end after this step, whose update is a sound one."""

    def replay(self, step: int, rows: Iterable[Mapping[str, float]]) -> None:
        """Go on after `step` steps, whose rows these are.

        Raises:
            AlarmStop: one that stops a run holds after them: whoever starts it again, by hand or not, has to decide.
        """
        for alarm in self._alarms.replay(rows):
            raise AlarmStop(
                f"alarm {alarm.name} holds after step {step}, where the run goes on: {alarm.reason}; use "
                f"alarms.{alarm.name}=warn to go on all the same"
            )

    def require_finite(self, step: int, metrics: Mapping[str, float], collected: Collected) -> None:
        """Before an update is made, and before it is published.

        Raises:
            AlarmStop: an advantage, the loss or the gradient's norm is not finite. Weights with it were neither made
                nor published.
        """
        if (alarm := not_finite(metrics)) is not None:
            raise self._stopped(step, alarm, metrics, collected, "; the update was refused, no weights were published")

    def observe(self, step: int, metrics: Mapping[str, float], collected: Collected) -> dict[str, float]:
        """Look at a step that is learned and published; tell what has begun to be wrong, and keep its trajectories.

        Returns:
            `alarms/<name>`: 1 for each alarm that holds, whether it is new or not.
        """
        for alarm in self._alarms.observe(metrics):
            if alarm.action == "stop":
                # All that hold are kept; the first of them is the cause.
                stopped = self._stopped(step, alarm, metrics, collected, "")
                self.stop = self.stop or stopped
            else:
                folder = self._files.alarm(step, alarm, metrics, collected)
                self._console.line(f"alarm after step {step}: {alarm.name}: {alarm.reason}; see {folder}")
        return {f"alarms/{name}": 1.0 for name in sorted(self._alarms.holding)}

    def _stopped(
        self, step: int, alarm: Alarm, metrics: Mapping[str, float], collected: Collected, so: str
    ) -> AlarmStop:
        folder = self._files.alarm(step, alarm, metrics, collected)
        return AlarmStop(f"alarm {alarm.name} at step {step}: {alarm.reason}{so}; its trajectories are in {folder}")
