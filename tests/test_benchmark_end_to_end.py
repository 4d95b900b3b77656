"""The arithmetic of the end-to-end benchmark, on rows and output as a run leaves them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raygym.config_file import load_config
from raygym.console import RunConsole

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import end_to_end
from harness.step_times import (
    BrokenRows,
    ideal_step_s,
    logging_share,
    require_stale,
    shares,
    step_s,
    warm,
)
from harness.train_run import RunFailed, override, read_run, train
from harness.view_cost import view_share

ROOT = Path(__file__).parent.parent


def row(number: int = 1, stale: float = 0, **parts_s: float) -> dict[str, Any]:
    parts = {"step": 10.0, "generate": 5.0, "learn": 3.0, "sync": 1.0, "log": 0.1} | parts_s
    return {"step": number, "policy/staleness_max": stale} | {f"time/{name}_s": value for name, value in parts.items()}


def test_the_split_is_of_all_steps_together_and_adds_up() -> None:
    found = shares([row(), row(step=30.0, generate=25.0)])
    assert found == pytest.approx({"generate": 30 / 40, "learn": 6 / 40, "sync": 2 / 40, "rest": 2 / 40})
    assert sum(found.values()) == pytest.approx(1)


def test_a_steps_time_counts_from_the_end_of_the_warm_up() -> None:
    assert step_s([100.0, 102.0, 105.0, 108.0], 1) == pytest.approx(8 / 3)
    assert step_s([100.0, 102.0, 105.0, 108.0], 2) == 3
    assert warm([row(1), row(2), row(3)], 2) == [row(3)]


def test_tools_find_the_plain_names() -> None:
    samples = {
        "async_share_of_ideal_simulated": [0.9, 1.0],
        "first_token_s_demo": [30.0],
        "async_over_sync_real_tiny": [1.3, 1.5],
        "async_over_sync_real_smollm2": [1.0, 1.2],
    }
    assert end_to_end.plain_names(samples) == {
        "async_share_of_ideal": [0.9, 1.0],
        "start_to_first_token_s": [30.0],
        "async_over_sync_real": [1.0, 1.2],
    }
    del samples["async_over_sync_real_smollm2"], samples["first_token_s_demo"]
    found = end_to_end.plain_names(samples)
    assert found["async_over_sync_real"] == [1.3, 1.5] and "start_to_first_token_s" not in found
    assert end_to_end.plain_names({}) == {}


def test_the_ideal_is_the_longer_side_alone() -> None:
    assert ideal_step_s([row(), row(generate=7.0)]) == 6
    assert ideal_step_s([row(generate=2.0), row(generate=3.0, learn=5.0)]) == 5, "learning with its sync"
    assert ideal_step_s([row(generate=4.0, rest=99.0)]) == 4, "what else is in a step counts nowhere"


def test_the_share_of_logging_is_of_the_whole_step() -> None:
    assert logging_share([row(log=0.1), row(log=0.3)], 20.0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (lambda: shares([{"step": 4}]), "step 4: time/step_s is None; expected a number"),
        (lambda: shares([row() | {"time/learn_s": "3"}]), "time/learn_s is '3'"),
        (lambda: shares([row() | {"time/learn_s": float("nan")}]), "time/learn_s is nan"),
        (lambda: shares([row(generate=8.0)]), r"are 1\.200 of time/step_s; expected at most all"),
        (lambda: shares([]), "adds up to 0"),
        (lambda: warm([row()], 1), "1 steps were made; expected more than the 1 of the warm-up"),
        (lambda: step_s([1.0, 2.0], 2), "2 steps were made"),
        (lambda: step_s([2.0, 2.0], 1), "a step took 0 s"),
        (lambda: ideal_step_s([row(stale=1)]), "staleness_max is 1 in the synchronous run"),
        (lambda: require_stale([row(), row()]), "nothing has overlapped"),
        (lambda: require_stale([{"step": 2}]), "policy/staleness_max is None"),
        (lambda: logging_share([row()], 0.0), "a step took 0 s"),
    ],
)
def test_rows_that_do_not_tell_it_are_refused_with_the_reason(compute: Any, told: str) -> None:
    with pytest.raises(BrokenRows, match=told):
        compute()


METRICS = {"reward/mean": 0.5, "tokens/generated": 16, "time/step_s": 4.0, "policy/logprob_abs_diff": 1e-6}
SUMMARY = {"started_at": 1001.5, "ready_s": 10.0, "first_token_s": 12.0}


def left(folder: Path, steps: int = 2, summary: dict[str, Any] | None = None) -> list[tuple[float, str]]:
    """A run's files, and what the real console prints of so many steps; the first line after a second."""
    rows = [{"step": step, **METRICS} for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(SUMMARY if summary is None else summary))
    file = io.StringIO()
    console = RunConsole(12, Console(file=file, width=80))
    console.note(f"raygym: run, tiny, 12 steps -> {folder}")
    for step in range(1, steps + 1):
        console.step(step, METRICS)
    return [(1.0 + number, line + "\n") for number, line in enumerate(file.getvalue().splitlines())]


def test_a_run_is_read_from_its_folder_and_its_output(tmp_path: Path) -> None:
    run = read_run(tmp_path, left(tmp_path), started_at=1000.0)
    assert [found["step"] for found in run.rows] == [1, 2]
    assert run.shown_s == [3.0, 4.0] and run.first_step_s == 3.0, "after the first line and the titles"
    assert (run.first_line_s, run.ready_s, run.first_token_s) == (1.0, 11.5, 13.5)


def test_a_run_that_left_too_little_is_refused(tmp_path: Path) -> None:
    lines = left(tmp_path)
    with pytest.raises(RunFailed, match=r"metrics\.jsonl has 2 steps and the console showed 1"):
        read_run(tmp_path, lines[:-1], 0.0)
    with pytest.raises(RunFailed, match=r"metrics\.jsonl has 0 steps"):
        read_run(tmp_path, left(tmp_path, steps=0), 0.0)
    with pytest.raises(RunFailed, match=r"summary\.json: first_token_s is missing"):
        read_run(tmp_path, left(tmp_path, summary={"started_at": 1, "ready_s": 2}), 0.0)
    lines = left(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(RunFailed, match="line 1 is no JSON object"):
        read_run(tmp_path, lines, 0.0)


def test_the_configs_of_the_benchmark_are_configs() -> None:
    given = {"batching": {"step_s": 0.02, "request_s": 1e-7}, "max_model_len": 1024}
    simulated = end_to_end.simulated_config(end_to_end.FAST_STEP_S)
    file, *overrides = simulated
    overrides += [override("policy.simulated", given), *end_to_end.PLAIN]
    assert load_config(ROOT / file, overrides).policy.simulated == given
    for file, *overrides in (simulated, end_to_end.BIG_TINY, (end_to_end.DEMO, end_to_end.EQUAL_WORK)):
        assert load_config(ROOT / file, overrides).learner.entropy_coef == 1e-6


def test_a_run_that_fails_ends_the_benchmark_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(quick: bool) -> dict[str, float]:
        raise RunFailed(f"quick: {quick}")

    monkeypatch.setenv("RAYGYM_BENCH_CALIBRATION", "off")
    monkeypatch.setitem(end_to_end.MEASUREMENTS, "demo", broken)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--quick", "--only", "demo"])
    with pytest.raises(SystemExit, match="end_to_end: demo: quick: True"):
        end_to_end.main()


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(RunFailed, match=r"(?s)status 2.*no/such\.yaml"):
        train(["no/such.yaml"])


def test_drawing_the_view_costs_something_and_no_core() -> None:
    assert 0 < view_share([{"step": 1, **METRICS, "advantage/histogram": None}], draws=3) < 1
