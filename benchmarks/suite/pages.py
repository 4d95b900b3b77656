"""What is generated from the committed results: benchmarks/README.md with its plots, and a section of the README."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from harness.result import Result, ResultError

from suite.drawing import draw, drawn_of
from suite.goals import Goal
from suite.outcomes import Kept, Outcome
from suite.plots import Plot, digest, plots
from suite.table import HEADER, Row, as_markdown, number, rows, spread

BEGIN = "<!-- performance: made by `make bench-pages` from benchmarks/results -->"
END = "<!-- /performance -->"
_INTRODUCTION = """# Benchmarks

<!-- Made by `make bench-pages` from results/ and goals.yaml; do not edit it. -->

Each claim of speed is a command that measures raygym beside what one would use instead, in one run, and prints the
ratio. `make bench` runs all of them in quick mode, within 20 minutes on two cores, and prints the table below with what
it has found; `make bench-full` takes hours and writes `results/`. `BENCH_ARGS="--only serving rollout"` behind either
is a part of it. Each is also a script of its own (`python benchmarks/serving.py --help`), whose last line is JSON in
one schema (`harness/result.py`).

- A figure is the **median** of its repetitions; **spread** is the largest of them minus the smallest, `-`
  where there was one repetition only.
- Two runs agree if their medians differ by no more than the **noise**: the larger of their spreads, and at least a part
  of the smaller median that [goals.yaml](goals.yaml) states, two and a half times that part of fewer than three samples
  (`suite/noise.py`). `make bench-agree BENCH_ARGS="folder other"` asks that of two runs, and `make bench-compare`
  whether a ratio of the last `make bench` is worse than the committed one by more than noise, or its benchmark failed.
- Where it says **simulated**, no model generates: the engine's times are drawn, and everything around it is real.
  `scale` has a virtual clock as well.
- One that needs what is not here is skipped and says so: TRL (`make trl`), NeMo Gym (`make nemo-gym`), vLLM, DeepSpeed.
- What is measured by hand, such as the soak and the demo, is in [the measurements](../docs/measurements.md).
"""


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the pages are."""

    readme: Path
    folder: Path
    """benchmarks/: its README.md, and `plots/`."""

    @property
    def page(self) -> Path:
        """The page of the benchmarks."""
        return self.folder / "README.md"

    def write(self, goals: Sequence[Goal], kept: Kept) -> list[Path]:
        """Bring everything up to date; returns what was changed.

        Raises:
            ResultError: a result is broken, or the README has no place for its section.
        """
        changed = []
        for path, text in self._texts(goals, kept).items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
                changed.append(path)
        wanted = self._plots(goals, kept)
        for path, plot in wanted.items():
            if _plot_differs(path, plot):
                path.parent.mkdir(exist_ok=True)
                path.write_text(draw(plot), encoding="utf-8")
                changed.append(path)
        for path in self._leftovers(wanted):
            path.unlink()
            changed.append(path)
        return changed

    def out_of_date(self, goals: Sequence[Goal], kept: Kept) -> list[Path]:
        """What `write` would change.

        Raises:
            ResultError: as `write`.
        """
        texts, wanted = self._texts(goals, kept), self._plots(goals, kept)
        old = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        return [*old, *(path for path, plot in wanted.items() if _plot_differs(path, plot)), *self._leftovers(wanted)]

    def _texts(self, goals: Sequence[Goal], kept: Kept) -> dict[Path, str]:
        results, outcomes = kept.results(), kept.outcomes()
        found = rows(goals, results, outcomes)
        readme = self.readme.read_text(encoding="utf-8")
        before, begin, rest = readme.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ResultError(f"{self.readme}: has no place for its figures; expected the lines {BEGIN} and {END}")
        return {
            self.page: benchmarks_page(found, results, outcomes, plots(found, results)),
            self.readme: f"{before}{BEGIN}\n{readme_section(found, results)}{END}{after}",
        }

    def _plots(self, goals: Sequence[Goal], kept: Kept) -> dict[Path, Plot]:
        results = kept.results()
        drawn = plots(rows(goals, results, kept.outcomes()), results)
        return {self.folder / "plots" / plot.file: plot for plot in drawn}

    def _leftovers(self, wanted: Mapping[Path, Plot]) -> list[Path]:
        return sorted(set((self.folder / "plots").glob("*.svg")) - wanted.keys())


def benchmarks_page(
    found: Sequence[Row], results: Mapping[str, Result], outcomes: Mapping[str, Outcome], drawn: Sequence[Plot]
) -> str:
    """The whole of benchmarks/README.md."""
    parts = [_INTRODUCTION, "## Goals\n"]
    if not results:
        parts.append("No full run is committed yet, so nothing is measured here.\n")
    parts.append(as_markdown([HEADER, *(row.cells for row in found)]) + "\n")
    parts += [f"![{plot.title}](plots/{plot.file})\n" for plot in drawn]
    bad = [(name, outcome) for name, outcome in outcomes.items() if outcome.status != "done"]
    if bad:
        parts.append("Of the full run, these gave no figures:\n")
        parts.append(as_markdown([("benchmark", "", "why"), *((n, o.status, o.why) for n, o in bad)]) + "\n")
    for name, result in results.items():
        parts.append("\n".join(_section(name, result)) + "\n")
    return "\n".join(parts)


def readme_section(found: Sequence[Row], results: Mapping[str, Result]) -> str:
    """What stands between the two marks of the README, in a dozen lines or so."""
    shown = [row for row in found if row.goal.readme]
    if not any(row.metric for row in shown):
        return "`make bench` measures all of it beside what one would use instead; no full run is committed yet.\n"
    lines: list[tuple[str, ...]] = [("measured beside its baseline in one run", "median", "spread", "goal", "")]
    lines += [
        (
            f"{row.goal.readme}{' (simulated engine)' if row.goal.simulated else ''}",
            *row.cells[2:4],
            row.goal.said or "-",
            row.said,
        )
        for row in shown
    ]
    said = _where([results[row.goal.benchmark] for row in shown if row.goal.benchmark in results])
    if any(row.metric and len(row.metric.samples) == 1 for row in shown):
        said += " Without a spread: measured once."
    said += " [All goals, met or not, and how it is measured](benchmarks/README.md)."
    return f"{as_markdown(lines)}\n\n{fill(said, 118, break_long_words=False, break_on_hyphens=False)}\n"


def _where(results: Sequence[Result]) -> str:
    machines = sorted({f"{r.machine.cores} cores of {r.machine.cpu}" for r in results})
    days = sorted({r.started[:10] for r in results})
    period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    quick = [result.quick for result in results]
    in_part = ", in part `make bench`," if any(quick) else ""
    command = "`make bench`" if all(quick) else f"`make bench-full`{in_part}"
    return f"By {command} on {' and on '.join(machines)}, {period}."


def _section(name: str, result: Result) -> Iterator[str]:
    machine, commit = result.machine, result.commit
    yield f"## {name}\n"
    versions = ", ".join(f"{package} {found}" for package, found in machine.packages.items())
    yield f"`{result.command}`: {result.seconds:.0f} s on {result.started[:10]}"
    at = f"at commit {commit.id[:10]}{' with changes' if commit.dirty else ''}" if commit else "at no commit"
    yield (
        f"{at}; {machine.cores} cores of {machine.cpu}, {machine.memory_gib:g} GiB, load at the start "
        f"{machine.load_at_start:g}; Python {machine.python}, {versions}."
    )
    if result.config is not None:
        said = result.config if isinstance(result.config, str) else json.dumps(result.config)
        yield f"Config: {said}."
    if calibrated := [
        f"{key} {number(value)}" for key, value in result.calibration.items() if not key.endswith("_spread")
    ]:
        yield f"Calibration: {', '.join(calibrated)}."
    yield ""
    lines = [("metric", "median", "spread", "unit", "samples")]
    for key in result.samples:
        metric = result.metric(key)
        assert metric is not None
        unit = "" if metric.unit in (None, "1") else metric.unit
        figures = number(metric.median), spread(metric)
        lines.append((f"`{key}`", *figures, str(unit), str(len(metric.samples))))
    yield as_markdown(lines)


def _plot_differs(path: Path, plot: Plot) -> bool:
    return not path.exists() or drawn_of(path.read_text(encoding="utf-8")) != digest(plot)
