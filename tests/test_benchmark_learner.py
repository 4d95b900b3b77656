"""What benchmarks/learner.py stands on: the rollouts, the processes that make steps, and that TRL computes the same."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from raygym.models import resolve_policy

ROOT = Path(__file__).parent.parent
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
SIDE = """
import os, sys
from harness.step_server import StepServer
server = StepServer()
print("not an answer")
for number in range(2):
    server.wait()
    kept = bytearray(2**25)
    server.answer(seconds=1.0, number=number, sees_raygym="raygym" in sys.modules)
raise SystemExit("had enough")
"""


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def harness(module: str) -> Any:
    return importlib.import_module(f"harness.{module}")


def test_lengths_are_those_of_the_workload() -> None:
    workload = harness("learn_workloads").Workload
    rng = np.random.default_rng(0)
    equal = workload(groups=2, group_size=4, prompt_tokens=5, completion_tokens=7)
    assert equal.completion_lengths(rng).tolist() == [7] * 8
    spread = workload(groups=500, group_size=4, prompt_tokens=5, completion_tokens=60, sigma=1.0, longest=400)
    lengths = spread.completion_lengths(rng)
    assert lengths.min() >= 1 and lengths.max() == 400
    assert 55 < np.median(lengths) < 65
    assert 0.9 < np.log(lengths[lengths < 400]).std() / np.log(lengths).std() < 1


def test_rollouts_survive_their_file_and_ratios_keep_away_from_the_bounds(tmp_path: Path) -> None:
    workloads = harness("learn_workloads")
    model_dir = resolve_policy("tiny")
    lengths = workloads.Workload(2, 4, prompt_tokens=6, completion_tokens=20, sigma=0.5, longest=40)
    made = workloads.make_rollouts(lengths, model_dir, temperature=0.8, noise=0.3)
    made.save(tmp_path / "rollouts.npz")
    read = type(made).load(tmp_path / "rollouts.npz")
    for name in ("prompts", "completions", "logprobs"):
        for ours, theirs in zip(getattr(made, name), getattr(read, name), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert (read.rewards, read.group_size, read.trained_tokens) == (made.rewards, 4, made.trained_tokens)
    assert all(np.array_equal(made.prompts[i], made.prompts[i - i % 4]) for i in range(8))
    assert len(set(made.rewards)) == 8

    model = workloads.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ratios = []
    for prompt, completion, logprobs in zip(made.prompts, made.completions, made.logprobs, strict=True):
        ratios.append(np.exp(workloads.completion_logprobs(model, prompt, completion, 0.8) - logprobs))
    ratios_N = np.concatenate(ratios)
    for bound in (0.8, 1.2):
        assert np.abs(ratios_N - bound).min() > 0.9 * workloads.MARGIN
    assert 0.3 < ((ratios_N < 0.8) | (ratios_N > 1.2)).mean() < 0.7


@pytest.mark.timeout(400)
def test_a_process_makes_steps_and_its_end_is_told(tmp_path: Path) -> None:
    steps = harness("step_process")
    (tmp_path / "fake_side.py").write_text(SIDE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with steps.StepProcess(Path(sys.executable), "fake_side", [], environment) as process:
        first, second = process.step(), process.step()
        assert (first["number"], second["number"], second["seconds"]) == (0, 1, 1.0)
        assert 32 < second["peak_mib"] < 1000
        assert not second["sees_raygym"]
        with pytest.raises(steps.StepError, match=r"(?s)fake_side ended.*not an answer.*had enough"):
            process.step()


def test_settings_go_through_a_command_line() -> None:
    settings = harness("learn_settings").LearnSettings("model", "file", 2, loss_length=8, learner={"packing": "rows"})
    assert type(settings).from_json(settings.as_json()) == settings


def learner_benchmark() -> ModuleType:
    return importlib.import_module("learner")


def test_the_worst_of_all_measurements_is_found() -> None:
    totals = learner_benchmark().totals(
        {
            "padding_fraction_equal": [0.0, 0.01],
            "padding_fraction_lognormal": [0.03],
            "padding_fraction_trl_equal": [0.5],
            "peak_memory_mib_equal": [10.0],
            "peak_memory_mib_trl_equal": [20.0],
            "loss_abs_diff_trl_equal": [1e-7],
            "loss_abs_diff_trl_setting_kl": [1e-8, 1e-5],
        }
    )
    assert totals["padding_fraction_max"] == [0.03]
    assert (totals["peak_memory_mib"], totals["peak_memory_mib_trl"]) == ([10.0], [20.0])
    assert totals["loss_abs_diff_trl"] == [1e-5]
    assert "grad_norm_rel_diff_trl" not in totals


def test_what_differs_in_its_advantages_is_not_compared() -> None:
    answer = {"advantages": [1.0, -1.0], "loss": 0.5, "grad_norm": 2.0}
    other = {"advantages": [1.0, -1.0], "loss": 0.25, "grad_norm": 1.0}
    found = learner_benchmark().differences("x", answer, other)
    assert found["loss_abs_diff_trl_x"] == 0.25 and found["grad_norm_rel_diff_trl_x"] == 1.0
    with pytest.raises(AssertionError, match="advantages"):
        learner_benchmark().differences("x", answer, {**other, "advantages": [1.0, -0.9]})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_trl_the_benchmark_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    code = f"import runpy, sys; sys.argv = ['learner.py']; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); "
    code += "import learner; from pathlib import Path; learner.TRL_PYTHON = Path('/no/such/python'); learner.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "make trl" in json.loads(done.stdout.splitlines()[-1])["skipped"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not TRL_PYTHON.exists(), reason="TRL is not prepared; `make trl`")
@pytest.mark.parametrize("setting", ["token_mean", "sequence_mean"])
def test_the_first_step_is_trls(setting: str, tmp_path: Path) -> None:
    """The other settings are compared by the benchmark itself."""
    bench, workloads = learner_benchmark(), harness("learn_workloads")
    run = bench.Run(resolve_policy("tiny"), tmp_path, 1, (4,), {}, False)
    lengths = workloads.Workload(2, 4, prompt_tokens=8, completion_tokens=12, sigma=0.7, longest=40)
    rollouts = workloads.make_rollouts(lengths, run.model_dir)
    settings = bench.replace(bench.saved(run, rollouts), trl_rows=4, **bench.SETTINGS[setting])
    with bench.trl(settings) as theirs, bench.ours(settings) as own:
        found = bench.differences(setting, own.step(), theirs.step())
    assert found[f"loss_abs_diff_trl_{setting}"] < 1e-5
    assert found[f"grad_norm_rel_diff_trl_{setting}"] < 1e-5
