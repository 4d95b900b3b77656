"""What a run prints: a live line under a growing table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from raygym.live_console import LiveConsole, duration

_SPARKS = "▁▂▃▄▅▆▇█"
# In 80 columns nine are left for the trend of the rewards. "logp Δ": between learner and engine.
_COLUMNS = (
    ("reward", 6), ("generate", 8), ("learn", 6), ("sync", 5), ("tok/s", 5), ("logp Δ", 6), ("failed", 6),
    ("eta", 6),
)  # fmt: skip
_LONGEST_TREND = 24
_ROWS_A_TITLE = 20


class RunConsole(LiveConsole):
    """Prints a run's progress: a row a step, with the trend of the rewards as a sparkline at its end."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        super().__init__(console)
        self._steps = steps
        self._rewards: list[float] = []
        self._rows = 0
        self._resumed_at = 0
        self._columns = [("step", max(5, 2 * len(str(steps)) + 1)), *_COLUMNS]

    def resume(self, step: int) -> None:
        """The next row is of the step after `step`, and time counts from here."""
        self._resumed_at = step
        self.start_clock()

    def progress(self, text: str) -> None:
        """Update the live line, in a terminal only; from any thread."""
        status = self._status
        if status is not None:
            status.update(self._live(text))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for a finished step, `step` counted from 1; column titles before the first and now and then again."""
        self._rewards.append(metrics["reward/mean"])
        if self._rows % _ROWS_A_TITLE == 0:
            titles = "  ".join(title.rjust(width) for title, width in self._columns)
            self._console.print(Text(titles, style="dim"))
        self._rows += 1
        failed = int(sum(value for name, value in metrics.items() if name.startswith("episodes/failed/")))
        # Over the whole step: what is generated while something else is waited for counts where it was used.
        rate = metrics["tokens/generated"] / max(metrics["time/step_s"], 1e-9)
        cells = [
            Text(f"{step}/{self._steps}"),
            Text(f"{metrics['reward/mean']:.3f}", style="bold"),
            *(Text(f"{metrics.get(f'time/{name}_s', 0.0):.1f}s") for name in ("generate", "learn", "sync")),
            Text(f"{rate:.0f}"),
            Text(f"{metrics['policy/logprob_abs_diff']:.0e}"),
            Text(f"{failed}", style="bold red" if failed else ""),
            Text(duration(self._eta(step))),
        ]
        for cell, (_, width) in zip(cells, self._columns, strict=True):
            cell.align("right", max(width, cell.cell_len))
        row = Text("  ").join(cells)
        # Last, since it is what grows.
        room = min(_LONGEST_TREND, max(1, self._console.width - row.cell_len - 2))
        row.append("  ").append(sparkline(self._rewards[-room:]), style="green")
        self._console.print(row)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for a validation after `step` steps; from any thread."""
        reward = f"{metrics['val/reward']:.3f}" if "val/reward" in metrics else "none"
        failed = f"  failed {metrics['val/failed']:.0f}" if metrics["val/failed"] else ""
        self.line(f"validation after step {step}: reward {reward}{failed}  {metrics['time/validate_s']:.1f}s")

    def _eta(self, step: int) -> float:
        done = max(1, step - self._resumed_at)
        return (time.monotonic() - self._started) / done * (self._steps - step)


def sparkline(values: list[float]) -> str:
    """One block character a value, from the lowest to the highest of them."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_SPARKS[round((value - low) / span * (len(_SPARKS) - 1))] for value in values)
