"""What a run prints: a growing table of steps, and in a terminal a view of the step being made below it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from raygym.live_console import LiveConsole, Verbosity, duration

_SPARKS = "▁▂▃▄▅▆▇█"
_LONGEST_TREND = 40
_ROWS_A_TITLE = 20
_FAILED = "episodes/failed/"
# The parts of a step's time: the metric, its name, and how the bar shows it. They are told apart without colours, too.
_PARTS = (
    ("time/generate_s", "generate", "█", "cyan"),
    ("time/learn_s", "learn", "▓", "blue"),
    ("time/sync_s", "sync", "▒", "magenta"),
    ("time/validate_wait_s", "wait for validation", "░", "yellow"),
    ("time/checkpoint_s", "checkpoint", "░", "green"),
)
_OTHER = ("other", " ", "dim")
# Of so many steps the time split is a mean: one alone says little where generating overlaps learning.
_SPLIT_STEPS = 10


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int
    rank: int
    """In a narrow terminal those of the highest rank are left out first."""


_COLUMNS = (
    _Column("step", 5, 0), _Column("reward", 6, 0), _Column("generate", 8, 3), _Column("learn", 6, 3),
    _Column("sync", 5, 3), _Column("tok/s", 5, 1), _Column("stale", 5, 4), _Column("logp Δ", 6, 4),
    _Column("eta", 6, 2), _Column("failed", 6, 0),
)  # fmt: skip


class RunConsole(LiveConsole):
    """Prints a run's progress: a row a step. The view has what the rows have no room for."""

    def __init__(
        self,
        steps: int,
        console: Console | None = None,
        verbosity: Verbosity = Verbosity.NORMAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is printed yet.

        Args:
            steps: of the whole run.
            console: for tests, as is the clock.
            verbosity: how much is told.
            clock: seconds.
        """
        super().__init__(console, verbosity, clock)
        self._steps = steps
        self._made = 0
        self._rows = 0
        self._resumed_at = 0
        self._row_at = self._started
        self._rewards: deque[float] = deque(maxlen=_LONGEST_TREND)
        self._validations: dict[int, float] = {}
        self._failures: Counter[str] = Counter()
        self._last: Mapping[str, float] = {}
        self._times: deque[Mapping[str, float]] = deque(maxlen=_SPLIT_STEPS)

    def start_clock(self) -> None:
        """The first step begins now."""
        super().start_clock()
        self._row_at = self._started

    def resume(self, step: int) -> None:
        """The next row is of the step after `step`, and time counts from here. What was made after it is taken back."""
        for _ in range(min(len(self._rewards), self._made - step)):
            self._rewards.pop()
        self._validations = {made: reward for made, reward in self._validations.items() if made <= step}
        self._resumed_at = self._made = step
        self.start_clock()

    def progress(self, text: str) -> None:
        """Update the view's first line, in a terminal only; from any thread."""
        self._progress = text

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for a finished step, `step` counted from 1; column titles before the first and now and then again."""
        failures = {
            name.removeprefix(_FAILED): int(value) for name, value in metrics.items() if name.startswith(_FAILED)
        }
        self._made, self._row_at, self._last = step, self._clock(), metrics
        self._rewards.append(metrics["reward/mean"])
        self._failures.update(failures)
        self._times.append({name: metrics.get(name, 0.0) for name in ("time/step_s", *(part[0] for part in _PARTS))})
        if self._verbosity > Verbosity.QUIET:
            self._print_row(step, metrics, failures)
        if held := [name.removeprefix("alarms/") for name in metrics if name.startswith("alarms/")]:
            self.detail(f"alarms that hold: {', '.join(held)}")

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for a validation after `step` steps; from any thread."""
        if "val/reward" in metrics:
            self._validations[step] = metrics["val/reward"]
        reward = f"{metrics['val/reward']:.3f}" if "val/reward" in metrics else "none"
        failed = f"  failed {metrics['val/failed']:.0f}" if metrics["val/failed"] else ""
        self.note(f"validation after step {step}: reward {reward}{failed}  {metrics['time/validate_s']:.1f}s")

    def _print_row(self, step: int, metrics: Mapping[str, float], failures: Mapping[str, int]) -> None:
        cells = {
            "step": Text(f"{step}/{self._steps}"),
            "reward": Text(f"{metrics['reward/mean']:.3f}", style="bold"),
            "generate": Text(f"{metrics.get('time/generate_s', 0.0):.1f}s"),
            "learn": Text(f"{metrics.get('time/learn_s', 0.0):.1f}s"),
            "sync": Text(f"{metrics.get('time/sync_s', 0.0):.1f}s"),
            "tok/s": Text(f"{_generated_per_s(metrics):.0f}"),
            "stale": Text(f"{metrics.get('policy/staleness_max', 0):.0f}"),
            "logp Δ": Text(f"{metrics['policy/logprob_abs_diff']:.0e}"),
            "eta": Text(duration(self._eta_s())),
            "failed": Text(f"{sum(failures.values())}", style="bold red" if failures else ""),
        }
        columns = self._columns()
        in_file = not self._console.is_interactive  # where a line is a line, however long
        if self._rows % _ROWS_A_TITLE == 0:
            titles = "  ".join(column.title.rjust(width) for column, width in columns)
            self._print(Text(titles, style="dim"), soft_wrap=in_file, no_wrap=True, crop=not in_file)
        self._rows += 1
        for column, width in columns:
            cell = cells[column.title]
            cell.align("right", max(width, cell.cell_len))
        row = Text("  ").join(cells[column.title] for column, _ in columns)
        if failures and in_file:  # a terminal's view has them
            row.append(f"  {_counted(failures)}")
        self._print(row, soft_wrap=in_file, no_wrap=True, crop=not in_file)

    def _columns(self) -> list[tuple[_Column, int]]:
        """Those that fit, with their widths. A file has room for all."""
        columns = [(column, column.width) for column in _COLUMNS]
        columns[0] = (_COLUMNS[0], max(5, 2 * len(str(self._steps)) + 1))
        while self._console.is_interactive and sum(width + 2 for _, width in columns) - 2 > self._console.width:
            least = max(column.rank for column, _ in columns)
            if least == 0:
                break
            at = max(index for index, (column, _) in enumerate(columns) if column.rank == least)
            del columns[at]
        return columns

    def _lines(self, width: int) -> list[Text]:
        lines = [self._rule(width), self._headline()]
        if self._rewards or self._validations or self._resumed_at:
            lines.append(self._progress_line(width))
        if self._rewards or self._validations:
            lines.append(self._reward_line(width))
        if self._times:
            lines += [self._split_line(width), self._speed_line(), self._policy_line()]
        if self._failures:
            total = Text().append(f"{self._failures.total()} attempts", style="red")
            lines.append(_labelled("failed", total.append(f": {_counted(self._failures)}", style="default")))
        return lines

    def _rule(self, width: int) -> Text:
        return Text().append("─" * (width - 1), style="dim")

    def _progress_line(self, width: int) -> Text:
        room = max(8, min(40, width - 44))
        share = self._made / max(1, self._steps)
        filled = round(share * room)
        bar = Text().append("━" * filled, style="green")
        bar.append("─" * (room - filled), style="dim")
        bar.append(f"  {self._made} of {self._steps} steps")
        if self._made > self._resumed_at:
            bar.append(f"  eta {duration(self._eta_s())}")
        return _labelled("run", bar)

    def _reward_line(self, width: int) -> Text:
        line = Text()
        if self._rewards:
            line.append(sparkline(list(self._rewards)[-max(6, min(_LONGEST_TREND, width - 66)) :]), style="green")
            line.append(f"  {self._rewards[-1]:.3f}", style="bold")
            line.append(f" ± {self._last.get('reward/std', 0.0):.2f}", style="dim")
        if self._validations:
            steps = sorted(self._validations)
            first, last = self._validations[steps[0]], self._validations[steps[-1]]
            came_from = f"{first:.3f} → " if len(steps) > 1 else ""
            line.append("  validation " if self._rewards else "validation ").append(f"{came_from}")
            line.append(f"{last:.3f}", style="bold").append(f" (step {steps[-1]})", style="dim")
        return _labelled("reward", line)

    def _split_line(self, width: int) -> Text:
        # A checkpoint is made between two steps.
        whole = sum(times["time/step_s"] + times["time/checkpoint_s"] for times in self._times) or 1.0
        parts = [
            (label, glyph, style, share)
            for name, label, glyph, style in _PARTS
            if (share := sum(times[name] for times in self._times) / whole) >= 0.005
        ]
        parts.append((*_OTHER, max(0.0, 1.0 - sum(share for *_, share in parts))))
        room = max(8, min(30, width - 62))
        line, used, upto = Text(), 0, 0.0
        for _, glyph, style, share in parts:
            upto += share
            until = min(room, round(upto * room))
            line.append(glyph * (until - used), style=style)
            used = max(used, until)
        for label, glyph, style, share in parts:
            if share >= 0.005:
                line.append(f"  {glyph}".rstrip() + " ", style=style).append(f"{label} {share:.0%}")
        return _labelled("time", line)

    def _speed_line(self) -> Text:
        last = self._last
        parts = [
            f"{_generated_per_s(last):,.0f} tok/s generated",
            f"{last.get('learn/tokens_per_s', 0.0):,.0f} learned",
        ]
        parts.append(f"{last.get('time/step_s', 0.0):.1f} s a step")
        if "episodes/completed" in last:
            parts.append(f"{last['episodes/completed'] / max(last.get('time/step_s', 0.0), 1e-9):,.1f} episodes/s")
        return _labelled("speed", Text("   ".join(parts)))

    def _policy_line(self) -> Text:
        last = self._last
        parts = [f"version {self._made}", f"staleness {last.get('policy/staleness_max', 0):.0f}"]
        parts.append(f"logp Δ to the engine {last['policy/logprob_abs_diff']:.0e}")
        return _labelled("weights", Text("   ".join(parts)))

    def _eta_s(self) -> float:
        made = max(1, self._made - self._resumed_at)
        a_step = (self._row_at - self._started) / made
        return max(0.0, a_step * (self._steps - self._made) - (self._clock() - self._row_at))


def sparkline(values: list[float]) -> str:
    """One block character a value, from the lowest to the highest of them."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_SPARKS[round((value - low) / span * (len(_SPARKS) - 1))] for value in values)


def _labelled(label: str, line: Text) -> Text:
    return Text().append(f"  {label:9}", style="dim").append_text(line)


def _counted(failures: Mapping[str, int]) -> str:
    most = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {count}" for kind, count in most)


def _generated_per_s(metrics: Mapping[str, float]) -> float:
    """Over the whole step: what is generated while something else is waited for counts where it was used."""
    return metrics["tokens/generated"] / max(metrics["time/step_s"], 1e-9)
