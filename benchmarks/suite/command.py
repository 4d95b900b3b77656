"""The suite's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from harness.result import Result, ResultError, printed_result

from suite.compare import agree, compare
from suite.entries import CALIBRATION, ENTRIES, QUICK_MINUTES, Entry
from suite.goals import Goal, load_goals
from suite.interrupts import Interrupted
from suite.outcomes import Kept, Outcome
from suite.pages import Pages
from suite.runner import ROOT, SuiteRun
from suite.table import NARROW_HEADER, SIMULATED, as_text, rows

COMMITTED = ROOT / "benchmarks" / "results"
QUICK = ROOT / "runs" / "bench"
GOOD, BAD, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: all is well; 1: a benchmark failed, a page is old, a ratio worse; 2: bad usage, a broken file."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.do(options))
    except ResultError as error:
        print(f"suite: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt as error:
        print("suite: interrupted; what has ended is kept", file=sys.stderr)
        return error.status if isinstance(error, Interrupted) else INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="suite", description="All benchmarks, and what is made of their results.")
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="run them, each with a time limit, and print the table")
    run.add_argument("--full", action="store_true", help="all of everything, hours; default: quick, 20 minutes")
    run.add_argument("--only", nargs="+", default=[], choices=[entry.name for entry in ENTRIES], metavar="NAME")
    run.add_argument("--no-calibration", action="store_true", help="with --only: no calibration but of memory")
    run.add_argument("--minutes", type=float, help=f"for all together (default: {QUICK_MINUTES:g}; full: no limit)")
    run.add_argument("--out", type=Path, help="the results' folder (default: runs/bench; full: benchmarks/results)")
    run.set_defaults(do=_run)
    keep = commands.add_parser(
        "keep", help="take over what a benchmark printed that was run by itself, with its options"
    )
    keep.add_argument("printed", type=Path, nargs="+", help="a file whose last line, or whole, is a result")
    keep.add_argument("--out", type=Path, default=COMMITTED, help="the results' folder (default: benchmarks/results)")
    keep.set_defaults(do=_keep)
    pages = commands.add_parser("pages", help="make benchmarks/README.md and the README's figures from the results")
    pages.add_argument("--check", action="store_true", help="change nothing; fail if they are out of date")
    pages.set_defaults(do=_pages)
    worse = commands.add_parser("compare", help="fail if a ratio is worse than the committed one by more than noise")
    worse.add_argument("new", type=Path, nargs="?", default=QUICK, help="a folder of results (default: runs/bench)")
    worse.add_argument("--committed", type=Path, default=COMMITTED, help="default: benchmarks/results")
    worse.set_defaults(do=_compare)
    same = commands.add_parser("agree", help="fail if two runs on one machine differ by more than noise")
    same.add_argument("first", type=Path)
    same.add_argument("second", type=Path)
    same.set_defaults(do=_agree)
    return parser


def chosen(*, full: bool, only: Set[str], calibrated: bool) -> list[Entry]:
    """What runs: those of `only`, or else all that the mode has; the calibration before them."""
    if only:
        return [e for e in ENTRIES if e.name in only or (calibrated and e.name == CALIBRATION)]
    return [e for e in ENTRIES if full or e.quick_s is not None]


def _run(options: argparse.Namespace) -> int:
    full, only = options.full, set(options.only)
    entries = chosen(full=full, only=only, calibrated=not options.no_calibration)
    kept = Kept(options.out or (COMMITTED if full else QUICK))
    # First, since what is wrong with them should not be found out after the run.
    goals, committed = load_goals(), {} if kept.folder == COMMITTED else Kept(COMMITTED).results()
    minutes = options.minutes if options.minutes is not None else None if full or only else QUICK_MINUTES
    within_s = None if minutes is None else minutes * 60
    suite = SuiteRun(entries, kept, ROOT / "runs" / "bench-logs", full=full, within_s=within_s)
    shown = [goal for goal in goals if not only or goal.benchmark in only]
    try:
        outcomes = suite.run(lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        # Of an interrupted run, too: it may have taken hours.
        _show(shown, kept, {entry.name for entry in entries}, committed)
    return GOOD if all(outcome.good for outcome in outcomes.values()) else BAD


def _show(goals: Sequence[Goal], kept: Kept, names: Set[str], committed: Mapping[str, Result]) -> None:
    """What these benchmarks gave. Others may have left results in the folder, of another day and commit."""
    outcomes = {name: outcome for name, outcome in kept.outcomes().items() if name in names}
    left_out = Outcome(status="not run", seconds=0.0, limit_s=0.0, why="not part of a quick run")
    results = {name: result for name, result in kept.results().items() if name in names}
    absent = {goal.benchmark: left_out for goal in goals if goal.benchmark not in names}
    table = rows(goals, results, outcomes | absent, committed)
    print(as_text([NARROW_HEADER, *(row.narrow_cells for row in table)]))
    print(f"{SIMULATED}: the engine was simulated; what each is, in words: benchmarks/README.md")
    _tell_bad(outcomes)


def _tell_bad(outcomes: Mapping[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if outcome.status != "done":
            print(f"{name}: {outcome.status}: {outcome.why}")
    print("all of it: " + ", ".join(f"{name} {outcome.seconds:.0f} s" for name, outcome in outcomes.items()))


def _keep(options: argparse.Namespace) -> int:
    # All are read before one is written: a broken one must not leave half of them.
    results = [printed_result(path) for path in options.printed]
    kept = Kept(options.out)
    for result in results:
        kept.keep(result.name, Outcome(status="done", seconds=result.seconds, limit_s=result.seconds), result)
        print(f"kept: {kept.result_file(result.name)}: {result.command}")
    return GOOD


def _pages(options: argparse.Namespace) -> int:
    pages, kept = Pages(ROOT / "README.md", ROOT / "benchmarks"), Kept(COMMITTED)
    if not options.check:
        for path in pages.write(load_goals(), kept):
            print(f"changed: {path.relative_to(ROOT)}")
        return GOOD
    old = pages.out_of_date(load_goals(), kept)
    for path in old:
        print(f"out of date: {path.relative_to(ROOT)}; run `make bench-pages`", file=sys.stderr)
    return BAD if old else GOOD


def _compare(options: argparse.Namespace) -> int:
    found = compare(load_goals(), _existing(options.committed), _existing(options.new))
    print(found.text)
    if found.bad:
        print(f"worse than the committed run by more than noise, or failed: {', '.join(found.bad)}")
    return BAD if found.bad or not found.compared else GOOD


def _agree(options: argparse.Namespace) -> int:
    found = agree(load_goals(), _existing(options.first), _existing(options.second))
    print(found.text)
    if found.bad:
        print(f"further apart than noise, or failed in one: {', '.join(found.bad)}")
    return BAD if found.bad or not found.compared else GOOD


def _existing(folder: Path) -> Kept:
    if not folder.is_dir():
        raise ResultError(f"{folder}: is no folder; expected one that `make bench` or `make bench-full` has written")
    return Kept(folder)
