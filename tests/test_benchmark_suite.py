"""The frame of all benchmarks: what a result is, goals, the table, the comparison, and a suite that nothing stops."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import staleness
from harness import calibration, report, report_skipped
from harness.result import Machine, Result, ResultError, Skipped, parse_result, read_result, summary
from harness.units import is_ratio, unit_of
from harness.worst import worst
from suite import command
from suite.compare import agree, compare
from suite.entries import ENTRIES, QUICK_MINUTES, Entry
from suite.goals import Goal, load_goals
from suite.noise import noise_of
from suite.outcomes import Kept, Outcome
from suite.pages import BEGIN, END, Pages
from suite.process import interrupt
from suite.runner import SuiteRun
from suite.table import as_markdown, as_text, number, rows

ROOT = Path(__file__).parent.parent
GOALS = load_goals()
SCRIPTS = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
BY_HAND = {"soak"}
MACHINE = Machine(cpu="a cpu", cores=2, memory_gib=24.0, python="3.11.1", packages={"ray": "1"}, load_at_start=0.1)


def made(
    samples: Mapping[str, Sequence[float]], name: str = "fake", *, config: str = "x", quick: bool = False, **more: Any
) -> Result:
    """A result with these samples."""
    kept = {key: list(values) for key, values in samples.items()}
    return Result(
        name=name,
        command=f"python benchmarks/{name}.py{' --quick' if quick else ''}",
        config=config,
        machine=MACHINE,
        started="2026-01-02T03:04:05Z",
        seconds=1.5,
        commit=None,
        calibration={"memcpy_gib_per_s": 5.0, "memcpy_gib_per_s_spread": 0.1},
        repetitions=max(map(len, kept.values())),
        metrics=summary(kept),
        samples=kept,
        units={key: unit for key in kept if (unit := unit_of(key))},
        **more,
    )


def goal(metric: str = "tokens_over_other", **more: Any) -> Goal:
    return Goal(benchmark="fake", metric=metric, says="a thing", issue=1, **more)


def kept(folder: Path, *results: Result) -> Kept:
    found = Kept(folder)
    for result in results:
        found.keep(result.name, Outcome(status="done", seconds=1.0, limit_s=2.0), result)
    return found


# A result


def test_a_report_is_a_line_that_can_be_read_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report("fake", {"a_ms": [3.0, 1.0, 2.0], "b_over_c": [1 / 3]}, config="c", calibration={"d": 1.0}, rows=[{"e": 1}])
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    result = parse_result(line, "the line")
    assert isinstance(result, Result)
    assert result.metrics == {"a_ms": 2.0, "a_ms_spread": 2.0, "b_over_c": 0.3333, "b_over_c_spread": 0.0}
    assert result.units == {"a_ms": "ms", "b_over_c": "1"} and result.samples["b_over_c"] == [0.333333]
    assert (result.config, result.calibration, result.details) == ("c", {"d": 1.0}, {"rows": [{"e": 1}]})
    assert result.repetitions == 3 and result.machine.packages["torch"] and result.machine.cores >= 1
    assert result.commit is None or len(result.commit.id) == 40
    metric = result.metric("a_ms")
    assert metric and (metric.median, metric.spread, metric.samples, metric.unit) == (2.0, 2.0, (3.0, 1.0, 2.0), "ms")
    assert result.metric("nothing") is None
    kept(tmp_path, result)
    assert read_result(tmp_path / "fake.json") == result


@pytest.mark.parametrize(
    ("samples", "said"),
    [({"a": [1.0, float("nan")]}, "fake: a: has the samples"), ({"a": []}, "one at least"), ({"a_spread": [1]}, "end")],
)
def test_what_is_no_figure_is_not_reported(samples: dict[str, list[float]], said: str) -> None:
    with pytest.raises(ResultError, match=said):
        report("fake", samples, calibration={})


def test_what_is_skipped_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    report_skipped("fake", "no such thing here; run `make thing`")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "skipped: no such thing here; run `make thing`"
    assert parse_result(lines[-1], "it") == Skipped(name="fake", skipped="no such thing here; run `make thing`")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": None}, "schema_version is None; expected 1. Another version"),
        ({"schema_version": 2}, "schema_version is 2; expected 1"),
        ({"metrics": {"a": 1.0}}, r"metrics.a: is 1.0; by the samples it is 2.0"),
        ({"metrics": {"a": 2.0}}, r"metrics.a_spread: is None; by the samples it is 0.0"),
        ({"samples": {"a": []}}, "samples.a: "),
        ({"samples": {"a": [float("inf")]}}, "samples.a.0: "),
        ({"machine": "an old computer"}, "machine: "),
        ({"started": "yesterday"}, "started: "),
        ({"colour": "red"}, "colour: Extra"),
    ],
)
def test_a_broken_result_is_refused_by_its_key(change: dict[str, Any], said: str) -> None:
    fields = json.loads(made({"a": [2.0]}).model_dump_json()) | change
    with pytest.raises(ResultError, match=f"^here: {said}"):
        parse_result(json.dumps(fields), "here")


@pytest.mark.parametrize(("text", "said"), [("{", "is no JSON"), ("[1]", "is no JSON object"), ("", "is no JSON")])
def test_what_is_no_object_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ResultError, match=f"x.json: {said}"):
        read_result(tmp_path / "x.json")


def test_a_file_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    kept(tmp_path, made({"a": [1.0]}, "one")).result_file("one").rename(tmp_path / "two.json")
    with pytest.raises(ResultError, match=r"two.json: is a result of one; expected one of two"):
        Kept(tmp_path).results()


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("overhead_ms_p99", "ms"),
        ("tokens_per_s_trl_equal", "tokens/s"),
        ("cpu_ms_per_turn_manager_64", "ms/turn"),
        ("memcpy_gib_per_s", "GiB/s"),
        ("manager_kib_per_episode_10000", "KiB/episode"),
        ("turn_over_method_us", "µs"),
        ("publish_and_apply_s_2", "s"),
        ("peak_memory_mib", "MiB"),
        ("tokens_per_cpu_s_over_trl_equal", "1"),
        ("efficiency_64", "1"),
        ("nemo_gym_turns_ratio_64", "1"),
        ("control_calls", None),
        ("episodes", None),
    ],
)
def test_the_unit_is_in_the_name(metric: str, unit: str | None) -> None:
    assert unit_of(metric) == unit
    assert is_ratio(metric) == (unit == "1")


# Calibration


@pytest.fixture
def uncalibrated() -> Iterator[None]:
    calibration.calibrate.cache_clear()
    yield
    calibration.calibrate.cache_clear()


def test_a_calibration_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncalibrated: None) -> None:
    kept(tmp_path, made({"ray_call_ms": [0.4]}, "calibrate"))
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "calibrate.json"))
    assert calibration.calibrate() == {"ray_call_ms": 0.4, "ray_call_ms_spread": 0.0}


def test_a_benchmark_by_itself_calibrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncalibrated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "calibrate.py"
    script.write_text(f"print({made({'ray_call_ms': [0.4]}, 'calibrate').model_dump_json()!r})")
    monkeypatch.setattr(calibration, "_SCRIPT", script)
    monkeypatch.setattr(calibration, "memcpy_gib_per_s", lambda: [5.0, 6.0, 7.0])
    monkeypatch.delenv(calibration.VARIABLE, raising=False)
    assert calibration.calibrate()["ray_call_ms"] == 0.4
    script.write_text("raise SystemExit(3)")
    calibration.calibrate.cache_clear()
    assert calibration.calibrate() == {"memcpy_gib_per_s": 6.0}
    assert (
        "calibration failed, only memory is measured: calibrate.py ended with exit status 3" in capsys.readouterr().err
    )
    monkeypatch.setenv(calibration.VARIABLE, calibration.OFF)
    calibration.calibrate.cache_clear()
    assert calibration.calibrate() == {"memcpy_gib_per_s": 6.0}
    assert not capsys.readouterr().err


def test_other_pythons_may_import_the_package() -> None:
    """TRL's has no pydantic of ours, and NeMo Gym's no numpy."""
    code = "import sys; import harness; print({'numpy', 'pydantic', 'psutil', 'raygym'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_worst_keeps_its_own_spread() -> None:
    samples = {"a": [1.0, 3.0, 0.1], "b": [0.8, 0.9, 1.4], "c": [0.95]}
    assert worst(samples, ["a", "b", "not measured"]) == [0.8, 0.9, 1.4]
    assert worst({"a": [1.0, 4.0], "b": [2.0, 2.2]}, ["b", "a"]) == [2.0, 2.2], "2.5 is the median of the other"


# Goals


@cache
def literals(module: str) -> set[str]:
    """All strings of a benchmark and of what it imports of the harness, parts of f-strings too, without outer `_`."""
    tree = ast.parse((ROOT / "benchmarks" / f"{module}.py").read_text(encoding="utf-8"))
    found = {
        node.value.strip("_") for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("harness."):
            found |= literals(node.module.replace(".", "/"))
    return found


def is_made_of(metric: str, pieces: set[str]) -> bool:
    """Whether a name is pieces with `_` between them."""
    return metric in pieces or any(
        metric[:cut] in pieces and is_made_of(metric[cut + 1 :], pieces)
        for cut, letter in enumerate(metric)
        if letter == "_"
    )


@pytest.mark.parametrize("wanted", GOALS, ids=lambda wanted: f"{wanted.benchmark}-{wanted.metric}")
def test_a_goal_is_of_a_metric_that_there_is(wanted: Goal) -> None:
    """A metric that is renamed would be told as not measured for ever."""
    assert wanted.benchmark in {entry.name for entry in ENTRIES}
    pieces = literals(wanted.benchmark)
    assert is_made_of(wanted.metric, pieces), f"{wanted.metric} is not in benchmarks/{wanted.benchmark}.py"
    assert not is_made_of(f"{wanted.metric}_renamed", pieces)


RELIED_ON = {
    "rollout": [
        "efficiency_64", "efficiency_1024", "efficiency_heavy_tail", "overhead_over_handle_round_trip_p50",
        "overhead_ms_p99", "loop_lag_ms_p99", "cost_per_episode_10000_over_100", "speedup_over_lockstep",
        "episodes_per_s",
    ],
    "nemo_gym": ["nemo_gym_turns_ratio"],
    "serving": ["handle_tokens_over_vllm", "http_tokens_over_vllm", "render_turn_100_over_10"],
    "learner": [
        "tokens_over_trl_equal", "tokens_over_trl_lognormal", "tokens_over_trl_shared_prompt", "loss_abs_diff_trl",
        "padding_fraction_max",
    ],
    "weight_sync": ["tcp_over_gloo", "shm_over_memcpy", "control_calls", "publish_and_apply_s"],
    "end_to_end": [
        "async_share_of_ideal", "async_over_sync_simulated", "async_over_sync_real", "start_to_first_token_s",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in RELIED_ON for name in RELIED_ON[module]])
def test_a_name_that_tools_rely_on_is_reported(module: str, name: str) -> None:
    assert is_made_of(name, literals(module))


def test_the_stated_goals_are_there() -> None:
    found = {g.metric: (g.said, g.issue) for g in GOALS if g.said}
    assert found["efficiency_64"] == ("at least 0.95", 6) and found["tcp_over_gloo"] == ("at least 0.8", 8)
    assert found["loop_lag_ms_p99"] == ("at most 20 ms", 6) and found["first_token_s_demo"] == ("at most 60 s", 10)
    assert {issue for _, issue in found.values()} == {4, 6, 7, 8, 10}
    # Faults leave nothing behind (6), and stale tokens learn as well as fresh ones (7).
    assert {found[f"leaked_{what}"] for what in ("requests", "sessions", "episodes")} == {("at most 0", 6)}
    assert {found[f"reward_lost_in_spreads_stale_{stale}"] for stale in (1, 4)} == {("at most 1", 7)}


def test_what_stale_tokens_cost_is_told_in_spreads_of_the_seeds() -> None:
    final = {"stale_0": [0.6, 0.5, 0.7], "stale_1": [0.5, 0.45, 0.55], "stale_4": [0.9, 0.8, 0.8]}
    found = staleness.lost_in_spreads({f"final_{setting}": rewards for setting, rewards in final.items()})
    assert {key: round(value, 6) for key, (value,) in found.items()} == {
        "reward_lost_in_spreads_stale_1": 0.5,
        "reward_lost_in_spreads_stale_4": -1.0,
    }
    alike = {"final_stale_0": [1.0, 1.0], "final_stale_4": [0.98, 0.98]}
    (value,) = staleness.lost_in_spreads(alike)["reward_lost_in_spreads_stale_4"]
    assert value == pytest.approx(2.0), "no spread at all counts as a hundredth"
    assert staleness.lost_in_spreads({"final_stale_0": [1.0], "final_stale_4": [0.5]}) == {}, "one seed has no noise"
    assert staleness.lost_in_spreads({"final_stale_4": [0.5, 0.6]}) == {}


@pytest.mark.parametrize(
    ("value", "least", "above", "most"), [(0.9, False, False, True), (1.0, True, False, True), (1.1, True, True, False)]
)
def test_a_goal_is_met_or_not(value: float, least: bool, above: bool, most: bool) -> None:
    found = goal(at_least=1.0).met(value), goal(above=1.0).met(value), goal(at_most=1.0).met(value), goal().met(value)
    assert found == (least, above, most, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "- {benchmark: a, metric: b, says: c, issue: 1, at_least: 1, at_most: 2}",
            "entry 0: b: has at_least and at_most",
        ),
        ("- {benchmark: a, metric: b, says: c, issue: 1, at_last: 1}", "entry 0: at_last Extra"),
        ("- {benchmark: a, metric: b, says: c}", "entry 0: issue Field required"),
        ("- &a {benchmark: a, metric: b, says: c, issue: 1}\n- *a", "b: is there twice"),
        ("- {", "cannot be read"),
    ],
)
def test_a_wrong_goal_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "goals.yaml").write_text(text)
    with pytest.raises(ResultError, match=said):
        load_goals(tmp_path / "goals.yaml")


# The table


def test_each_goal_has_its_verdict() -> None:
    goals = [
        goal("a_over_b", at_least=1.0),
        goal("c_over_d", at_least=2.0),
        goal("seconds_s"),
        goal("not_there", at_least=1.0),
        goal("tiny_over_x", at_least=1.0, quick_differs="the tiny model"),
    ]
    result = made({"a_over_b": [1.1], "c_over_d": [1.9], "seconds_s": [3.0], "tiny_over_x": [9.0]}, quick=True)
    found = [row.said for row in rows(goals, {"fake": result}, {})]
    assert found == [
        "met", "NOT met", "reported", "not measured (not part of a quick run)", "not comparable (the tiny model)"
    ]  # fmt: skip


def test_what_a_quick_run_has_not_is_of_the_committed_one() -> None:
    goals = [goal("a_over_b", at_least=1.0), goal("tiny_over_x", at_least=1.0, quick_differs="the tiny model")]
    quick = {"fake": made({"tiny_over_x": [9.0]}, quick=True)}
    full = {"fake": made({"a_over_b": [1.2], "tiny_over_x": [0.9]})}
    first, second = rows(goals, quick, {}, full)
    assert first.said == "met (committed run of 2026-01-02)" and first.metric and first.metric.median == 1.2
    assert second.said == "NOT met (committed run of 2026-01-02)"


@pytest.mark.parametrize("status", ["failed", "over", "skipped", "not run"])
def test_what_gave_no_figures_says_why(status: Any) -> None:
    outcomes = {"fake": Outcome(status=status, seconds=1.0, limit_s=2.0, why="because")}
    assert [row.said for row in rows([goal()], {}, outcomes)] == [f"not measured ({status}: because)"]


@pytest.mark.parametrize(
    ("value", "how", "shown"),
    [
        (0.94961, {"at_least": 0.95}, "0.9496"),
        (1.5003, {"at_most": 1.5}, "1.5003"),
        (1.0, {"above": 1.0}, "1"),
        (0.9, {"at_least": 0.95}, "0.9"),
        (0.9504, {"at_least": 0.95}, "0.95"),
    ],
)
def test_what_missed_its_goal_by_little_can_be_seen_to(value: float, how: dict[str, float], shown: str) -> None:
    assert rows([goal("a_over_b", **how)], {"fake": made({"a_over_b": [value] * 3})}, {})[0].cells[2] == shown


def test_one_sample_has_no_spread() -> None:
    one, two = (rows([goal("a_over_b")], {"fake": made({"a_over_b": [1.0] * count})}, {})[0] for count in (1, 2))
    assert (one.cells[3], two.cells[3]) == ("-", "0") and one.narrow_cells[3] == "-"


def test_tables_are_aligned_and_escaped() -> None:
    assert as_text([("a", "bb"), ("ccc", "d")]) == "a    bb\n---  --\nccc  d"
    assert as_markdown([("a", "b"), ("c|d", "e")]) == "| a | b |\n|---|---|\n| c\\|d | e |"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9549, "1", "0.955"),
        (12345.6, "ms", "12,346 ms"),
        (512.34, None, "512.3"),
        (1e-7, None, "1e-07"),
        (None, "s", "-"),
    ],
)
def test_figures_are_short(value: float | None, unit: str | None, text: str) -> None:
    assert number(value, unit) == text


# Noise


def metric(*samples: float) -> Any:
    return made({"a_over_b": samples}).metric("a_over_b")


def test_noise_is_the_larger_spread_but_a_part_of_the_value_at_least() -> None:
    g = goal("a_over_b", at_least=1.0)
    assert noise_of(g, metric(0.9, 1.0, 1.3), metric(1.0, 1.0, 1.0)) == pytest.approx(0.4)
    assert noise_of(g, metric(1.0, 1.0, 1.0), metric(2.0, 2.0, 2.0)) == pytest.approx(0.1)
    assert noise_of(g, metric(1.0, 1.0, 1.0), metric(1.0)) == pytest.approx(0.25), "one sample has no spread"
    assert noise_of(goal("a_over_b", noise=0.02), metric(1.0, 1.0, 1.0)) == pytest.approx(0.02)
    assert noise_of(goal("a_s"), metric(1.0)) is None


@pytest.mark.parametrize(
    ("better", "old", "new", "bad"),
    [
        ({"at_least": 1.0}, 1.0, 0.91, False),
        ({"at_least": 1.0}, 1.0, 0.88, True),
        ({"at_least": 1.0}, 1.0, 2.0, False),
        ({"at_most": 1.0}, 1.0, 1.12, True),
        ({"at_most": 1.0}, 1.0, 0.2, False),
        ({"better": "lower"}, 1.0, 1.12, True),
        ({}, 1.0, 0.1, False),
    ],
)
def test_a_ratio_that_fell_is_found(better: dict[str, Any], old: float, new: float, bad: bool, tmp_path: Path) -> None:
    before = kept(tmp_path / "old", made({"a_over_b": [old] * 3}))
    now = kept(tmp_path / "new", made({"a_over_b": [new] * 3}))
    found = compare([goal("a_over_b", **better)], before, now)
    assert (found.bad == ["a_over_b"]) == bad
    assert ("WORSE" in found.text) == bad


def test_only_what_can_be_compared_is(tmp_path: Path) -> None:
    goals = [goal("a_s", at_most=1.0, noise=0.1), goal("a_over_b", at_least=1.0)]
    before = kept(tmp_path / "old", made({"a_s": [1.0] * 3, "a_over_b": [2.0] * 3}))
    slower = kept(tmp_path / "slow", made({"a_s": [9.0] * 3, "a_over_b": [2.0] * 3}))
    assert not compare(goals, before, slower).bad, "another machine has other seconds"
    assert agree(goals, before, slower).bad == ["a_s"]
    other = kept(tmp_path / "other", made({"a_over_b": [0.1] * 3}, config="y"))
    found = compare(goals, before, other)
    assert not found.bad and not found.compared and "not compared, since their configs differ: fake" in found.text


def test_a_wide_noise_does_not_hide_that_all_is_lost(tmp_path: Path) -> None:
    """One sample and half of the value as noise are 1.25 of it, and no ratio can fall by more than itself."""
    goals = [goal("a_over_b", at_least=1.0, noise=0.5)]
    before = kept(tmp_path / "old", made({"a_over_b": [2.0]}))
    for now, bad in ((1.0, []), (0.8, ["a_over_b"]), (0.0, ["a_over_b"])):
        found = compare(goals, before, kept(tmp_path / f"{now}", made({"a_over_b": [now]})))
        assert found.bad == bad, now


def test_two_runs_agree_whichever_is_named_first(tmp_path: Path) -> None:
    goals = [goal("a_over_b", at_least=1.0)]
    small, large = (kept(tmp_path / str(v), made({"a_over_b": [v] * 3})) for v in (1.0, 1.105))
    assert agree(goals, small, large).bad == agree(goals, large, small).bad == ["a_over_b"]


def test_what_a_quick_run_measures_otherwise_is_not_compared_with_a_full_one(tmp_path: Path) -> None:
    goals = [goal("a_over_b", at_least=1.0), goal("c_over_d", at_least=1.0, quick_differs="the tiny model")]
    full = kept(tmp_path / "full", made({"a_over_b": [2.0] * 3, "c_over_d": [2.0] * 3}))
    quick = kept(tmp_path / "quick", made({"a_over_b": [2.0] * 3, "c_over_d": [0.1] * 3}, quick=True))
    slow = kept(tmp_path / "slow", made({"a_over_b": [2.0] * 3, "c_over_d": [0.01] * 3}, quick=True))
    assert not compare(goals, full, quick).bad and "c_over_d" not in compare(goals, full, quick).text
    assert compare(goals, quick, slow).bad == ["c_over_d"], "two quick runs measure the same"


@pytest.mark.parametrize("status", ["failed", "over", "not run"])
def test_a_benchmark_that_gave_nothing_is_no_good_run(status: Any, tmp_path: Path) -> None:
    goals = [goal("a_over_b", at_least=1.0), Goal(benchmark="other", metric="c_over_d", says="x", issue=1)]
    before = kept(tmp_path / "old", made({"a_over_b": [2.0]}), made({"c_over_d": [2.0]}, "other"))
    now = kept(tmp_path / "new", made({"c_over_d": [2.0]}, "other"))
    assert compare(goals, before, now).bad == [], "it was not asked for"
    now.keep("fake", Outcome(status=status, seconds=1.0, limit_s=2.0, why="because"), None)
    found = compare(goals, before, now)
    assert found.bad == ["fake"] and f"fake: {status}: because" in found.text


def test_a_ratio_that_is_not_there_any_more_is_told(tmp_path: Path) -> None:
    before = kept(tmp_path / "old", made({"a_over_b": [2.0], "c_over_d": [1.0]}))
    now = kept(tmp_path / "new", made({"c_over_d": [1.0]}))
    found = compare([goal("a_over_b", at_least=1.0), goal("c_over_d", at_least=1.0)], before, now)
    assert not found.bad and "not measured now: a_over_b" in found.text


def test_another_machine_is_told(tmp_path: Path) -> None:
    before = kept(tmp_path / "old", made({"a_over_b": [2.0]}))
    other = made({"a_over_b": [2.0]}).model_copy(update={"machine": MACHINE.model_copy(update={"cores": 8})})
    assert "machine" not in compare([goal("a_over_b", at_least=1.0)], before, before).text
    text = compare([goal("a_over_b", at_least=1.0)], before, kept(tmp_path / "new", other)).text
    assert "another machine: 2 cores of a cpu before, 8 cores of a cpu now" in text


# The suite

FAKES = {
    "good": "print('some words'); print({good!r})",
    "skips": "print({skips!r})",
    "fails": "import sys; print('one\\ntwo: the cause', file=sys.stderr); sys.exit(7)",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "silent": "pass",
    "words": "print('all is well')",
    "broken": "print({good!r}[:-20])",
    "old": 'print(\'{{"name": "old", "metrics": {{}}}}\')',
    "other": "print({good!r})",
}
EXPECTED = {
    "good": ("done", ""),
    "skips": ("skipped", "no such thing"),
    "fails": ("failed", "exit status 7: one / two: the cause"),
    "killed": ("failed", "signal 9: it said nothing"),
    "silent": ("failed", "it printed nothing; expected one line of JSON"),
    "words": ("failed", "its last line: is no JSON"),
    "broken": ("failed", "its last line: is no JSON"),
    "old": ("failed", "its last line: schema_version is None"),
    "other": ("failed", "its last line is a result of good; expected one of other"),
}


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    lines = {
        "good": made({"tokens_over_other": [2.0, 2.5, 3.0]}, "good").model_dump_json(),
        "skips": Skipped(name="skips", skipped="no such thing").model_dump_json(),
    }
    for name, code in FAKES.items():
        (folder / f"{name}.py").write_text(code.format(**lines))
    return folder


def suite_of(names: Sequence[str], tmp_path: Path, fakes: Path, grace_s: float = 0.5, **more: Any) -> SuiteRun:
    entries = [Entry(name, 30.0, 30.0) for name in names]
    return SuiteRun(entries, Kept(tmp_path / "results"), tmp_path / "logs", scripts=fakes, grace_s=grace_s, **more)


def test_whatever_a_benchmark_does_the_others_go_on(tmp_path: Path, fakes: Path) -> None:
    told: list[str] = []
    run = suite_of([*FAKES, "good"], tmp_path, fakes)
    outcomes = run.run(told.append)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {n: s for n, (s, _) in EXPECTED.items()}
    for name, (_, why) in EXPECTED.items():
        assert outcomes[name].why.startswith(why), outcomes[name].why
    assert run.kept.outcomes() == outcomes and set(run.kept.results()) == {"good"}
    assert told[0] == "good ..." and told[-1] == "good: done after 0 s"
    assert (tmp_path / "logs" / "fails.err").read_text() == "one\ntwo: the cause\n"


def test_one_that_hangs_may_clean_up_and_is_ended_with_all_that_it_started(
    tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fakes / "hangs.py").write_text(
        "import subprocess, time\n"
        "child = subprocess.Popen(['sh', '-c', 'trap : INT; while :; do sleep 0.1; done'])\n"
        f"try:\n    open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n    time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'tidied')!r}, 'w')\n    time.sleep(600)\n"
    )
    wait = subprocess.Popen.wait

    def over_when_it_hangs(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """Its limit is over once it does what is looked for, however long the machine takes to start it."""
        if timeout != 30.0 or not str(process.args).count("hangs.py"):
            return wait(process, timeout)
        while not written(tmp_path / "child"):
            assert process.poll() is None
            time.sleep(0.02)
        return wait(process, 0.1)

    monkeypatch.setattr(subprocess.Popen, "wait", over_when_it_hangs)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's `&` starts us
    try:
        outcomes = suite_of(["hangs", "good"], tmp_path, fakes, grace_s=3).run(lambda line: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcomes["hangs"].status == "over" and "it took more than 30 s" in outcomes["hangs"].why
    assert outcomes["good"].status == "done"
    assert (tmp_path / "tidied").exists()
    gone(int((tmp_path / "child").read_text()))


def test_what_a_benchmark_started_in_sessions_of_its_own_is_ended_too(tmp_path: Path) -> None:
    """As NeMo Gym's servers are: a signal to the benchmark's group does not reach them."""
    (tmp_path / "apart.py").write_text(
        "import subprocess, time\n"
        "sleep = ['sh', '-c', 'trap : INT; sleep 600 & wait; sleep 600']\n"
        f"pids, children = open({str(tmp_path / 'children')!r}, 'w'), []\n"
        "def start():\n"
        "    children.append(subprocess.Popen(sleep, start_new_session=True))\n"
        "    print(children[-1].pid, file=pids, flush=True)\n"
        "try:\n    start()\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    start()\n    time.sleep(600)\n"
    )
    children = tmp_path / "children"
    with subprocess.Popen([sys.executable, str(tmp_path / "apart.py")], start_new_session=True) as benchmark:
        deadline = time.monotonic() + 60
        while not written(children):
            assert benchmark.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        interrupt(benchmark, 3.0)
    assert benchmark.returncode == -signal.SIGKILL
    for pid in children.read_text().split():
        gone(int(pid))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_suite_that_is_ended_leaves_nothing_and_tells_what_it_has(
    number: int, status: int, tmp_path: Path, fakes: Path
) -> None:
    (fakes / "hangs.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    goals = [Goal(benchmark=name, metric="tokens_over_other", says="a", issue=1) for name in ("good", "hangs", "skips")]
    (tmp_path / "goals.json").write_text(json.dumps([goal.model_dump() for goal in goals]))
    (tmp_path / "main.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from functools import partial\nfrom pathlib import Path\n"
        "from suite import command\nfrom suite.entries import Entry\nfrom suite.goals import load_goals\n"
        "command.ENTRIES = [Entry(name, 60, 60) for name in ('good', 'hangs', 'skips')]\n"
        f"command.ROOT = command.COMMITTED = Path({str(tmp_path)!r}) / 'root'\n"
        f"command.SuiteRun = partial(command.SuiteRun, scripts=Path({str(fakes)!r}), grace_s=5)\n"
        f"command.load_goals = partial(load_goals, Path({str(tmp_path / 'goals.json')!r}))\n"
        f"sys.exit(command.main(['run', '--out', {str(tmp_path / 'out')!r}]))\n"
    )
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as suite:
        deadline = time.monotonic() + 60
        while not written(tmp_path / "pid"):
            assert suite.poll() is None and time.monotonic() < deadline, suite.communicate()
            time.sleep(0.02)
        suite.send_signal(number)
        shown, said = suite.communicate(timeout=60)
    assert suite.returncode == status, said
    gone(int((tmp_path / "pid").read_text()))
    assert "good       tokens_over_other  2.5" in shown
    assert "not measured (not run: the suite was interrupted)" in shown
    assert "suite: interrupted; what has ended is kept" in said and "Traceback" not in said
    outcomes = Kept(tmp_path / "out").outcomes()
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "good": "done", "hangs": "not run", "skips": "not run"
    }  # fmt: skip


def written(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def gone(pid: int, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "a process of the benchmark is still there"
        time.sleep(0.02)


def test_all_together_have_a_limit(tmp_path: Path, fakes: Path) -> None:
    outcomes = suite_of(["good", "skips"], tmp_path, fakes, within_s=0.1).run(lambda line: None)
    assert {outcome.status for outcome in outcomes.values()} == {"not run"}
    assert outcomes["good"].why == "the 0 minutes of all together were over"


def test_old_figures_are_not_taken_for_new_ones(tmp_path: Path, fakes: Path) -> None:
    suite_of(["good", "skips"], tmp_path, fakes).run(lambda line: None)
    (fakes / "good.py").write_text("raise SystemExit(1)")
    run = suite_of(["good"], tmp_path, fakes)
    run.run(lambda line: None)
    assert run.kept.results() == {} and run.kept.outcomes()["good"].status == "failed"
    assert run.kept.outcomes()["skips"].status == "skipped", "what did not run now stays"


def test_a_benchmark_that_did_not_run_shows_no_figures_of_an_earlier_run(
    tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that is part of a full run only, and ran by name a week ago."""
    monkeypatch.setattr(command, "ENTRIES", [Entry("good", 30, 30), Entry("fake", None, 30)])
    monkeypatch.setattr(command, "SuiteRun", partial(SuiteRun, scripts=fakes, grace_s=0.5))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "load_goals", lambda: [goal()])
    kept(tmp_path / "out", made({"tokens_over_other": [7.0]}))
    assert command.main(["run", "--out", str(tmp_path / "out")]) == 0
    assert "not part of a quick run" in (shown := capsys.readouterr().out) and "7" not in shown


def test_every_benchmark_gets_the_calibration(tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "another-cluster:1")
    show = f"import os; open({str(tmp_path / 'env')!r}, 'w').write(repr(dict(os.environ)))"
    (fakes / "shows.py").write_text(show)
    (fakes / "calibrate.py").write_text(f"print({made({'a_ms': [1.0]}, 'calibrate').model_dump_json()!r})")
    for names, expected in ((["calibrate", "shows"], str(tmp_path / "results/calibrate.json")), (["shows"], None)):
        if expected is None:
            (tmp_path / "results" / "calibrate.json").unlink()
        suite_of(names, tmp_path, fakes).run(lambda line: None)
        environment = ast.literal_eval((tmp_path / "env").read_text())
        assert environment[calibration.VARIABLE] == (expected or calibration.OFF)
        assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT) and "RAY_ADDRESS" not in environment


def test_what_needs_something_that_is_not_here_is_skipped(tmp_path: Path, fakes: Path) -> None:
    entries = [
        Entry("fails", 30, 30, needs=("no_such_engine", "json")),
        Entry("good", 30, 30, needs=("json",)),
        Entry("skips", 30, 30, full_needs=("no_such_engine",)),
    ]
    run = SuiteRun(entries, Kept(tmp_path / "results"), tmp_path / "logs", scripts=fakes, grace_s=0.5)
    outcomes = run.run(lambda line: None)
    assert outcomes["fails"].status == "skipped" and outcomes["good"].status == "done"
    assert outcomes["fails"].why == "no_such_engine is not installed here; run `make setup` once"
    assert outcomes["skips"].why == "no such thing", "its quick run does without"
    assert run.kept.outcomes() == outcomes
    full = SuiteRun(entries[2:], run.kept, tmp_path / "logs", scripts=fakes, grace_s=0.5, full=True)
    assert full.run(lambda line: None)["skips"].why.startswith("no_such_engine is not installed")


def test_the_suite_has_all_benchmarks() -> None:
    assert {entry.name for entry in ENTRIES} == SCRIPTS - BY_HAND
    for entry in ENTRIES:
        source = (ROOT / "benchmarks" / f"{entry.name}.py").read_text()
        assert '"--quick"' in source or entry.quick_s is None


def test_a_quick_run_has_time_for_all() -> None:
    """Their limits together exceed it, since not all reach theirs; the least that matter most are given is in it."""
    quick = [entry.quick_s for entry in ENTRIES if entry.quick_s is not None]
    assert sum(quick[:5]) <= QUICK_MINUTES * 60


@pytest.mark.parametrize(("names", "status"), [(["good", "skips"], 0), (["good", "fails"], 1), (["silent"], 1)])
def test_the_exit_status_says_how_it_went(
    names: list[str], status: int, tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "ENTRIES", [Entry(name, 30, 30) for name in FAKES])
    monkeypatch.setattr(command, "SuiteRun", partial(SuiteRun, scripts=fakes, grace_s=0.5))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    goals = [
        Goal(benchmark=name, metric="tokens_over_other", says="a thing", issue=1, simulated=True, at_least=1.0)
        for name in ("good", "another")
    ]
    monkeypatch.setattr(command, "load_goals", lambda: goals)
    assert command.main(["run", "--only", *names, "--out", str(tmp_path / "out")]) == status
    shown = capsys.readouterr().out
    assert ("good" in names) == ("~tokens_over_other  2.5     1       1      at least 1  met" in shown)
    assert "another" not in shown, "what was not asked for is left out"
    if "fails" in names:
        assert "fails: failed: exit status 7: one / two: the cause" in shown


def test_what_runs_is_chosen() -> None:
    names: Callable[..., list[str]] = lambda **how: [entry.name for entry in command.chosen(**how)]  # noqa: E731
    assert names(full=False, only={"serving"}, calibrated=True) == ["calibrate", "serving"]
    assert names(full=False, only={"staleness"}, calibrated=False) == ["staleness"]
    assert names(full=True, only=set(), calibrated=True) == [entry.name for entry in ENTRIES]
    assert "staleness" not in names(full=False, only=set(), calibrated=True)


def test_bad_usage_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["compare", str(tmp_path), "--committed", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: is no folder; expected one that `make bench`" in capsys.readouterr().err
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(ResultError, match=r"suite.json: is not what the suite has written .*; remove it"):
        Kept(tmp_path).outcomes()


def test_two_runs_are_compared_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    for folder, value in zip(folders, (1.0, 1.02, 0.5), strict=True):
        kept(Path(folder), made({"handle_tokens_over_vllm": [value] * 3}, "serving"))
    first, second, third = folders
    assert command.main(["agree", first, second]) == 0
    assert command.main(["agree", first, third]) == 1
    assert "further apart than noise, or failed in one: handle_tokens_over_vllm" in capsys.readouterr().out
    assert command.main(["compare", third, "--committed", first]) == 1
    assert command.main(["compare", second, "--committed", first]) == 0
    other = kept(tmp_path / "d", made({"control_calls": [6.0]}, "weight_sync"))
    assert command.main(["compare", str(other.folder), "--committed", first]) == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_what_was_run_by_itself_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving, learner = (
        made({"handle_tokens_over_vllm": [1.0]}, "serving"),
        made({"padding_fraction_max": [0.0]}, "learner"),
    )
    (tmp_path / "printed.txt").write_text(f"a step took 3 s\n{{not this}}\n{serving.model_dump_json()}\n\n")
    (tmp_path / "written.json").write_text(learner.model_dump_json(indent=1) + "\n")
    (tmp_path / "broken.txt").write_text("a step took 3 s\n")
    out = tmp_path / "results"
    files = [str(tmp_path / name) for name in ("printed.txt", "written.json", "broken.txt")]
    assert command.main(["keep", *files, "--out", str(out)]) == 2
    assert "broken.txt: is no JSON" in capsys.readouterr().err
    assert not out.exists(), "one that is broken keeps the others out, too"
    assert command.main(["keep", *files[:2], "--out", str(out)]) == 0
    assert Kept(out).results() == {"serving": serving, "learner": learner}
    assert {name: outcome.status for name, outcome in Kept(out).outcomes().items()} == dict.fromkeys(
        ("serving", "learner"), "done"
    )


# Pages


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of this repository: run `make bench-pages` after a change of benchmarks/results or goals.yaml."""
    assert command.main(["pages", "--check"]) == 0, capsys.readouterr().err


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    (tmp_path / "benchmarks").mkdir()
    return Pages(readme, tmp_path / "benchmarks")


def test_pages_are_made_of_results(pages: Pages, tmp_path: Path) -> None:
    goals = [goal("a_over_b", at_least=1.0, readme="A over b"), goal("c_ms", at_most=1.0, simulated=True)]
    results = kept(tmp_path / "results")
    assert pages.out_of_date(goals, results) == [pages.page, pages.readme]
    assert set(pages.write(goals, results)) == {pages.page, pages.readme}
    assert "no full run is committed yet" in pages.readme.read_text()
    assert pages.out_of_date(goals, results) == [] and pages.write(goals, results) == []

    kept(results.folder, made({"a_over_b": [1.5], "c_ms": [2.0, 3.0]}, details={}))
    results.keep("worse", Outcome(status="over", seconds=9.0, limit_s=9.0, why="too long"), None)
    plot = pages.folder / "plots" / "goals.svg"
    assert set(pages.out_of_date(goals, results)) == {pages.page, pages.readme, plot}
    pages.write(goals, results)
    readme, page, svg = pages.readme.read_text(), pages.page.read_text(), plot.read_text()
    assert readme.startswith("# A\n") and readme.endswith("\n\nMore.\n") and "old" not in readme
    assert "| A over b | 1.5 | - | at least 1 | met |" in readme and "[All goals" in readme
    assert "| fake | a thing (simulated) | 2.5 ms | 1 | - | at most 1 ms | NOT met | 1 |" in page
    assert "![" in page and "| worse | over | too long |" in page and "| `c_ms` | 2.5 | 1 | ms | 2 |" in page
    assert "<svg" in svg and "fake: a_over_b<" in svg and "fake: c_ms (simulated)<" in svg
    assert ">1.5</text>" in svg and ">0.4</text>" in svg, "how far it was reached can be read"
    assert pages.out_of_date(goals, results) == []

    kept(results.folder, made({"a_over_b": [1.6]}))
    (pages.folder / "plots" / "nobody.svg").write_text("<svg/>")
    assert set(pages.out_of_date(goals, results)) == {
        pages.page, pages.readme, plot, pages.folder / "plots" / "nobody.svg"
    }  # fmt: skip
    pages.write(goals, results)
    assert plot.read_text() != svg and not (pages.folder / "plots" / "nobody.svg").exists()


def test_a_line_of_a_plot_is_drawn(pages: Pages, tmp_path: Path) -> None:
    # All samples below their median as it is rounded.
    samples = {f"{who}_tokens_per_s_{n}": [n + 0.00006] * 2 for who in ("vllm", "http") for n in (1, 8, 32)}
    pages.write([], kept(tmp_path / "results", made(samples, "serving")))
    svg = (pages.folder / "plots" / "serving.svg").read_text()
    assert "plain vllm serve" in svg and "raygym, HTTP" in svg and "raygym, as episodes ask" not in svg


def test_only_drawing_needs_the_library_of_plots(pages: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import suite.command"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert not done.returncode, done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResultError, match=r"drawn by matplotlib, which cannot be imported .*; run `make setup`"):
        pages.write([goal("a_over_b", at_least=1.0)], kept(tmp_path / "results", made({"a_over_b": [2.0]})))


@pytest.mark.parametrize(
    ("quick", "said"),
    [
        ((False, False), "By `make bench-full` on"),
        ((True, True), "By `make bench` on"),
        ((True, False), "By `make bench-full`, in part `make bench`, on"),
    ],
)
def test_the_readme_says_by_which_command(quick: tuple[bool, bool], said: str, pages: Pages, tmp_path: Path) -> None:
    names = ("one", "two")
    results = [made({"a_over_b": [1.0] * 2}, name, quick=q) for name, q in zip(names, quick, strict=True)]
    goals = [Goal(benchmark=name, metric="a_over_b", says="a", issue=1, readme="A over b") for name in names]
    pages.write(goals, kept(tmp_path / "results", *results))
    assert said in pages.readme.read_text()


def test_a_readme_without_its_marks_is_said(pages: Pages, tmp_path: Path) -> None:
    pages.readme.write_text("# A\n")
    with pytest.raises(ResultError, match="has no place for its figures"):
        pages.write([], kept(tmp_path / "results"))
