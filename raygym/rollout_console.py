"""What `raygym rollout` prints: a view in a terminal, a line now and then elsewhere, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from raygym.live_console import LiveConsole, Verbosity, duration

# Lines of a file, where nothing can be drawn anew: the first soon, later ones with the length of the run.
_PLAIN_EVERY_S = 5.0
_PLAIN_SHARE = 0.05


class RolloutConsole(LiveConsole):
    """Prints a rollout's progress and its result."""

    def __init__(
        self,
        total: int,
        console: Console | None = None,
        verbosity: Verbosity = Verbosity.NORMAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is printed yet.

        Args:
            total: episodes that are still to be played.
            console: for tests, as is the clock.
            verbosity: how much is told.
            clock: seconds.
        """
        super().__init__(console, verbosity, clock)
        self._total = total
        self._told = self._started
        self._finished = 0
        self._parts: list[str] = []
        self._failures: Mapping[str, int] = {}

    def start_clock(self) -> None:
        """The episodes begin now."""
        super().start_clock()
        self._told = self._started

    def progress(self, episodes: int, turns: int, tokens: int, running: int, failures: Mapping[str, int]) -> None:
        """How far it is.

        Args:
            episodes: finished since the clock was started; so are the turns and the tokens.
            turns: see there.
            tokens: generated.
            running: episodes in flight.
            failures: attempts by kind.
        """
        now = self._clock()
        elapsed = max(now - self._started, 1e-9)
        # A guess from too few episodes is worse than none.
        eta = duration(elapsed / episodes * (self._total - episodes)) if episodes else "?"
        self._finished, self._failures = episodes, dict(failures)
        self._parts = [f"{running} running", f"{turns} turns", f"{tokens / elapsed:.0f} tok/s", f"eta {eta}"]
        if self._console.is_interactive or now - self._told < max(_PLAIN_EVERY_S, _PLAIN_SHARE * elapsed):
            return
        self._told = now
        told = [
            f"{episodes}/{self._total} episodes",
            *self._parts,
            *([f"failed {failed(failures)}"] if failures else []),
        ]
        self.note("  ".join(told))

    def result(self, result: Mapping[str, Any]) -> None:
        """The end: the whole in a few lines, each environment in a row of a table."""
        speed = f" in {duration(result['seconds'])} ({result['tokens_per_s']:.0f} tok/s)" if result["seconds"] else ""
        self.line(f"{result['episodes']} episodes, {result['turns']} turns, {result['tokens']} tokens{speed}")
        if result["failures"]:
            self.line(f"failed attempts: {failed(result['failures'])}; tasks dropped: {result['dropped_tasks']}")
        if result["reward"] is None:
            self.line("no task was completed: there is no reward to tell")
            return
        error = result["reward_stderr"]
        self.line(f"reward {result['reward']:.3f}" + (f" ± {error:.3f} (standard error)" if error is not None else ""))
        passed = "  ".join(f"pass@{k} {value:.3f}" for k, value in result["pass_at"].items())
        self.line(f"{passed}  (success: reward >= {result['success']:g})")
        self._rows(result)

    def _rows(self, result: Mapping[str, Any]) -> None:
        ks = list(dict.fromkeys(("1", max(result["pass_at"], key=int))))
        titles = ["episodes", "reward", *(f"pass@{k}" for k in ks), "turns", "drift", "failed", "dropped"]
        rows = [
            [
                str(row["episodes"]),
                _number(row["reward"], ".3f"),
                *(_number(row["pass_at"].get(k), ".3f") for k in ks),
                _number(row["turns_mean"], ".1f"),
                _number(row["drift_rate"], ".1%"),
                str(sum(row["failures"].values())),
                str(row["dropped_tasks"]),
            ]
            for row in result["envs"].values()
        ]
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        names = ["environment", *result["envs"]]
        longest = max(map(len, names))
        if self._console.is_interactive:
            longest = max(8, min(longest, self._console.width - sum(widths) - 2 * len(widths)))
        for name, cells in zip(names, [titles, *rows], strict=True):
            # Names of one package begin alike, so the end is what tells them apart.
            short = name if len(name) <= longest else "…" + name[1 - longest :]
            line = short.ljust(longest) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths, strict=True))
            self._print(Text(line, style="dim" if cells is titles else ""))

    def _lines(self, width: int) -> list[Text]:
        lines = [self._headline()]
        if self._parts:
            room = max(8, min(40, width - 28))
            filled = round(self._finished / max(1, self._total) * room)
            bar = Text("  ").append("━" * filled, style="green").append("─" * (room - filled), style="dim")
            lines.append(bar.append(f"  {self._finished}/{self._total} episodes"))
            lines.append(Text("  " + "  ".join(self._parts)))
        if self._failures:
            lines.append(Text(f"  failed {failed(self._failures)}", style="red"))
        return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def failed(failures: Mapping[str, int]) -> str:
    """Failed attempts in a few words: how many, and of which kinds."""
    return f"{sum(failures.values())} ({', '.join(f'{kind} {count}' for kind, count in failures.items())})"
