"""Alarms: when each rule holds, that it is told once, and what is kept of the step."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_run_files import collected

from raygym.alarm_watch import AlarmWatch
from raygym.alarms import Alarms, AlarmStop, not_finite
from raygym.config import ConfigError, RunConfig
from raygym.config_file import parse_config
from raygym.console import RunConsole
from raygym.run_files import RunFiles

ACTIONS = ("entropy_collapse", "logprob_drift", "gradient_spike", "reward_collapse")


def run_config(tmp_path: Path = Path("runs"), **alarms: Any) -> RunConfig:
    return parse_config(
        {
            "name": "t",
            "steps": 1,
            "runs_dir": str(tmp_path),
            "policy": {"model": "tiny"},
            "envs": [{"id": "a"}],
            "alarms": alarms,
            "logging": {"tensorboard": False, "trajectories": False},
        }
    )


def held(config: RunConfig, rows: list[dict[str, float]]) -> list[set[str]]:
    """Which alarms hold after each step."""
    alarms, names = Alarms(config), []
    for row in rows:
        alarms.observe(row)
        names.append(set(alarms.holding))
    return names


def steps_of(name: str, config: RunConfig, rows: list[dict[str, float]]) -> list[int]:
    return [step for step, names in enumerate(held(config, rows)) if name in names]


def series(key: str, values: list[float], **rest: float) -> list[dict[str, float]]:
    return [{key: value, **rest} for value in values]


def test_entropy_that_stays_below_a_share_of_its_start() -> None:
    config = run_config(patience=2, entropy_share=0.25)
    rows = series("policy/entropy", [1.9, 2.1, 1.0, 0.4, 0.6, 0.4, 0.45, 0.3, 0.9])
    assert steps_of("entropy_collapse", config, rows) == [6, 7], "two in a row below 0.25 x 2.0, until it is back"
    assert not any(held(run_config(patience=2, entropy_share=0.25, entropy_collapse="off"), rows))


def test_logprobs_of_an_on_policy_step_above_the_limit() -> None:
    config = run_config(patience=2)
    rows = series("policy/logprob_abs_diff", [0.001, 0.02, 0.001, 0.02, 0.03, 0.001])
    assert steps_of("logprob_drift", config, rows) == [4]
    assert "nats, 2 steps in a row above 0.01" in begun_reason(config, rows)
    bfloat16 = config.model_copy(update={"learner": config.learner.model_copy(update={"dtype": "bfloat16"})})
    assert steps_of("logprob_drift", bfloat16, rows) == []
    assert steps_of("logprob_drift", run_config(patience=2, logprob_limit=0.025), rows) == []


def test_logprobs_of_stale_tokens_must_besides_be_unusual() -> None:
    config = run_config(patience=1, window=3)
    usual = [0.03, 0.05, 0.04]
    rows = series("policy/logprob_abs_diff", [*usual, 0.11, 0.16, 0.17, 0.14, 0.16], **{"policy/staleness_max": 2})
    assert steps_of("logprob_drift", config, rows) == [4, 5], "0.11 is within 3 x 0.04, and then usual"
    assert "3 times the" in begun_reason(config, rows)


def test_a_gradient_far_above_the_median() -> None:
    config = run_config(window=3, gradient_times=5)
    norms = [90.0, 1.0, 0.0, 2.0, 9.0, 11.0, 2.0]
    assert steps_of("gradient_spike", config, series("grad/norm", norms)) == [5], "0 is of a step without signal"
    assert steps_of("gradient_spike", config, series("grad/norm", [0.0] * 6 + [1.0])) == []


def test_a_step_that_trained_no_token_is_no_measurement_of_the_policy() -> None:
    """Its entropy, difference and norm are 0: the mean of nothing."""
    config = run_config(patience=2, window=3)
    nothing = {"policy/entropy": 0.0, "policy/logprob_abs_diff": 0.0, "grad/norm": 0.0, "tokens/trained": 0}

    def with_pauses(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        return [part for row in rows for part in (nothing, nothing, nothing, row | {"tokens/trained": 9})]

    entropy = series("policy/entropy", [2.0, 2.0, 2.0, 0.1, 0.1])
    assert steps_of("entropy_collapse", config, with_pauses(entropy)) == [19], "not what the pauses begin with or add"
    difference = series("policy/logprob_abs_diff", [0.001, 0.5, 0.5])
    assert steps_of("logprob_drift", config, with_pauses(difference)) == [11], "two in a row, of those that trained"
    rewards = [{"reward/mean": mean, "reward/std": 0.0, "tokens/trained": 0} for mean in (1, 1, 1, 0, 0)]
    assert steps_of("reward_collapse", config, rewards) == [4], "all episodes fail alike, so nothing is trained"


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_a_reward_that_falls_from_its_best(shift: float) -> None:
    config = run_config(patience=2, window=3, reward_drop=0.5)
    means = [0.1, 0.2, 0.3, 0.6, 0.62, 0.58, 0.61, 0.3, 0.6, 0.3, 0.2, 0.1, 0.6]
    rows = series("reward/mean", [mean + shift for mean in means], **{"reward/std": 0.45})
    assert steps_of("reward_collapse", config, rows) == [10, 11]


def test_a_reward_that_varies_from_step_to_step_or_is_perfect_may_fall_a_little() -> None:
    config = run_config(patience=1, window=3, reward_drop=0.1)
    noisy = series("reward/mean", [0.2, 0.8, 0.5, 0.3, 0.7, 0.2], **{"reward/std": 0.4})
    assert steps_of("reward_collapse", config, noisy) == []
    perfect = [{"reward/mean": 1.0, "reward/std": 0.0}] * 4 + [{"reward/mean": 0.99, "reward/std": 0.1}]
    assert steps_of("reward_collapse", config, perfect) == []
    assert steps_of("reward_collapse", config, [*perfect, {"reward/mean": 0.0, "reward/std": 0.0}]) == [5]


def begun_reason(config: RunConfig, rows: list[dict[str, float]]) -> str:
    alarms = Alarms(config)
    told = [alarm.reason for row in rows for alarm in alarms.observe(row)]
    assert len(told) == 1, "told once, however long it holds"
    assert "\n" not in told[0]
    return told[0]


scalars = st.sampled_from([0.0, 1e-4, 0.02, 0.5, 1.0, 3.0, 40.0, math.nan, math.inf])
rows_strategy = st.lists(
    st.dictionaries(
        st.sampled_from(
            ["policy/entropy", "policy/logprob_abs_diff", "policy/staleness_max", "grad/norm", "reward/mean"]
        ),
        scalars,
    ).map(lambda row: row | {"reward/std": 0.1}),
    max_size=30,
)


@given(rows_strategy, st.integers(0, 30))
def test_whoever_goes_on_with_a_run_sees_what_one_run_would(rows: list[dict[str, float]], at: int) -> None:
    config = run_config(patience=2, window=2)
    whole, second = Alarms(config), Alarms(config)
    told = [whole.observe(row) for row in rows]
    second.replay(rows[:at])
    assert [second.observe(row) for row in rows[at:]] == told[at:]


@given(rows_strategy)
def test_an_alarm_is_told_when_it_begins(rows: list[dict[str, float]]) -> None:
    alarms, before = Alarms(run_config(patience=1, window=2)), frozenset[str]()
    for row in rows:
        told = alarms.observe(row)
        assert {alarm.name for alarm in told} == alarms.holding.keys() - before
        before = frozenset(alarms.holding)


def test_nothing_that_is_not_finite_is_let_pass() -> None:
    assert not_finite({"loss": 0.1, "grad/norm": 3.0, "advantage/abs_mean": 0.5}) is None
    for name in ("loss", "grad/norm", "advantage/abs_mean"):
        for value in (math.nan, math.inf, -math.inf):
            alarm = not_finite({"loss": 0.1, name: value})
            assert alarm is not None and alarm.action == "stop" and f"{name} is {value}" in alarm.reason


def test_the_config_refuses_what_is_no_alarm() -> None:
    for wrong in ({"entropy": "warn"}, {"entropy_collapse": "email"}, {"window": 1}, {"gradient_times": 1}):
        with pytest.raises(ConfigError):
            run_config(**wrong)


def test_a_run_that_an_alarm_has_stopped_does_not_go_on_unasked(tmp_path: Path) -> None:
    rows = series("policy/logprob_abs_diff", [0.001, 0.5])
    watch, _, _ = watched(tmp_path, patience=1, logprob_drift="stop")
    with pytest.raises(AlarmStop, match=r"logprob_drift holds after step 2.*alarms\.logprob_drift=warn"):
        watch.replay(2, rows)
    watched(tmp_path / "warn", patience=1, logprob_drift="warn")[0].replay(2, rows)
    watched(tmp_path / "over", patience=1, logprob_drift="stop")[0].replay(3, [*rows, *rows[:1]])


def watched(tmp_path: Path, **alarms: Any) -> tuple[AlarmWatch, RunFiles, io.StringIO]:
    config, out = run_config(tmp_path, **alarms), io.StringIO()
    files = RunFiles(config)
    return AlarmWatch(config, files, RunConsole(1, Console(file=out, width=400))), files, out


def test_a_warning_is_one_line_a_scalar_and_a_folder_with_the_trajectories(tmp_path: Path) -> None:
    watch, files, out = watched(tmp_path, patience=1, window=2)
    seen = [watch.observe(step, {"grad/norm": norm}, collected()) for step, norm in enumerate([1, 1, 50, 1.0], 1)]
    assert seen == [{}, {}, {"alarms/gradient_spike": 1.0}, {}]
    assert watch.stop is None
    folder = files.path / "alarms" / "step_000003_gradient_spike"
    assert [path.name for path in (files.path / "alarms").iterdir()] == [folder.name]
    line = out.getvalue()
    assert line.startswith("alarm after step 3: gradient_spike: grad/norm 50, 50 times") and line.count("\n") == 1
    records = [json.loads(text) for text in (folder / "trajectories.jsonl").read_text().splitlines()]
    assert [record["reward"] for record in records] == [0.0, 1.0, 0.5, 0.5]
    told = json.loads((folder / "alarm.json").read_text())
    assert (told["step"], told["alarm"], told["action"]) == (3, "gradient_spike", "warn")
    assert told["metrics"] == {"grad/norm": 50} and told["reason"] in line


def test_of_alarms_that_stop_the_first_is_the_cause_and_all_are_kept(tmp_path: Path) -> None:
    watch, files, _ = watched(tmp_path, patience=1, window=2, logprob_drift="stop", gradient_spike="stop")
    for step, norm in enumerate([1, 1, 50], 1):
        watch.observe(step, {"grad/norm": norm, "policy/logprob_abs_diff": 1.0 if step == 3 else 0.0}, collected())
    assert watch.stop is not None and str(watch.stop).startswith("alarm logprob_drift at step 3: ")
    assert "\n" not in str(watch.stop)
    assert len(list((files.path / "alarms").iterdir())) == 2


def test_what_is_not_finite_stops_at_once_and_its_file_is_json(tmp_path: Path) -> None:
    watch, files, _ = watched(tmp_path, **dict.fromkeys(ACTIONS, "off"))
    with pytest.raises(AlarmStop, match=r"alarm not_finite at step 7: loss is nan; .* in .*step_000007_not_finite"):
        watch.require_finite(7, {"loss": math.nan, "grad/norm": 1.0}, collected())
    text = (files.path / "alarms/step_000007_not_finite/alarm.json").read_text()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=no_constant)["metrics"] == {"loss": None, "grad/norm": 1.0}
