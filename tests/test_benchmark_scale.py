"""The simulated cluster of `benchmarks/scale.py`: what must be true of it at every size."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from raygym.batching_config import BatchingConfig
from raygym.simulated_batching import ContinuousBatching

ENGINE = BatchingConfig(step_s=0.01, request_s=0.0002, prefill_token_s=2e-5, kv_blocks=1000, block_size=64)
PLACES = 16


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    names = ("virtual_cluster", "virtual_engines", "virtual_manager", "virtual_time")
    return SimpleNamespace(**{name: importlib.import_module(f"harness.{name}") for name in names})


def setup_of(scale: Any, **changes: Any) -> Any:
    workload = scale.virtual_engines.Workload(prompt_tokens=64, tokens_per_turn=40, most_tokens=160, group_size=4)
    cost = scale.virtual_manager.ManagerCost(call_s=5e-4, begin_s=1e-4, end_s=1e-4)
    base = scale.virtual_cluster.ClusterSetup(
        ENGINE, workload, cost, 2, places_per_gpu=PLACES, learn_s=2.0, warm_up=2, steps=4
    )
    return replace(base, **changes)


def run_of(scale: Any, **changes: Any) -> Any:
    return scale.virtual_cluster.simulate_cluster(setup_of(scale, **changes))


@pytest.mark.parametrize("order", ["task", "completion"])
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize(("gpus", "runners"), [(1, 1), (6, 3)])
def test_episodes_are_conserved_and_the_bound_of_staleness_is_kept(
    scale: Any, gpus: int, runners: int, max_staleness: int, order: str
) -> None:
    run = run_of(scale, gpus=gpus, runners=runners, max_staleness=max_staleness, order=order)
    assert run.begun == run.ended + run.at_end
    assert run.delivered == 4 * gpus * PLACES
    assert run.delivered <= run.ended
    assert 0 <= run.staleness_mean <= run.staleness_max <= max_staleness
    assert run.most_at_once <= -(-gpus * PLACES // runners) * runners
    assert 0 <= run.empty_places < 1


def figures_of(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, *, quick: bool) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    scale = importlib.import_module("harness.scale_figures")
    manager = importlib.import_module("harness.virtual_manager")

    def row(gpus: int, bound: int = 1, slower: float = 1.0, episodes_per_s: float = 640.0) -> dict[str, float]:
        row = {"gpus": gpus, "max_staleness": bound, "manager_slower": slower, "scheduler_us": 7.0}
        return row | dict.fromkeys(scale.REPORTED, 0.5) | {"episodes_per_s": episodes_per_s}

    costs = [manager.ManagerCost(1e-3, 1e-4, c) for c in (1e-4, 3e-4, 4e-4)]
    parts = scale.Parts(6000.0, 6.0, costs, 5e-4, 1e-5)
    assert parts.cost == manager.ManagerCost(1e-3, 1e-4, 3e-4)
    rows = [row(64), row(1024), row(64, bound=0)]
    slowed = [rows[0], row(64, slower=8, episodes_per_s=600), row(64, slower=128, episodes_per_s=200)]
    found: dict[str, Any] = scale.figures(rows, slowed, parts, 4, quick=quick)
    return found


def test_what_is_reported_of_runs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    found = figures_of(monkeypatch, request, quick=False)
    assert found["manager_saturates_at_gpus"] == [200 * 128 / (640 / 64)]
    assert found["gpus_per_env_runner"] == [pytest.approx(1000 / (0.26 * 40))]
    assert found["share_of_ideal_1024_gpus"] == found["share_of_ideal_64_gpus_staleness_0"] == [0.5]
    assert found["slowest_over_median_64_gpus"] == found["share_of_ideal_manager_128_times_slower"] == [0.5]
    assert len(found["manager_limit_episodes_per_s"]) == len(found["manager_call_ms"]) == 3


def test_what_is_played_for_a_moment_has_no_throughput(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    found = figures_of(monkeypatch, request, quick=True)
    assert found["scheduler_us_1024_gpus"] == [7.0] and found["episodes_per_s_64_gpus"] == [640.0]
    assert {key for key in found if "1024" in key} == {"scheduler_us_1024_gpus"}


def test_steps_that_overlap_are_stale_and_fast(scale: Any) -> None:
    apart, overlapping = (run_of(scale, max_staleness=bound) for bound in (0, 1))
    assert apart.staleness_max == 0 and overlapping.staleness_max == 1
    assert overlapping.episodes / overlapping.seconds > 1.2 * apart.episodes / apart.seconds


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_no_cluster_is_faster_than_its_engines_by_themselves(scale: Any, max_staleness: int) -> None:
    setup = setup_of(scale, max_staleness=max_staleness, steps=12, learn_s=0.0)
    ideal, _ = scale.virtual_cluster.engine_alone(ENGINE, setup.workload, PLACES, 1500)
    run = scale.virtual_cluster.simulate_cluster(setup)
    # The lengths that either has played differ a little.
    assert 0.3 < run.tokens / run.seconds / (ideal * setup.gpus) < 1.02


def test_one_episode_takes_what_the_batching_model_says(scale: Any) -> None:
    """By itself, turn by turn, against the model asked directly."""
    workload = setup_of(scale).workload
    _, episodes_per_s = scale.virtual_cluster.engine_alone(ENGINE, workload, 1, 1)
    engine, now_s = ContinuousBatching(ENGINE), 0.0
    lengths = [workload.lengths(0, 0), workload.lengths(0, 1)]
    ends = []
    for turns in lengths:
        history = scale.virtual_engines.np.full(workload.prompt_tokens, 0, "int32")
        for number, length in enumerate(turns):
            made = scale.virtual_engines.np.full(length, 10_000 + 10 * len(ends) + number, "int32")
            request = engine.submit(now_s, history, made)
            while request.finished_s is None:
                due_s = engine.next_event_s()
                assert due_s is not None
                now_s = due_s
                engine.advance(now_s)
            history = scale.virtual_engines.np.concatenate([request.token_ids, workload.observation])
            now_s += workload.env_s if number + 1 < len(turns) else 0.0
        ends.append(now_s)
    assert 1 / episodes_per_s == pytest.approx(ends[1] - ends[0])


def test_the_same_setup_gives_the_same(scale: Any) -> None:
    first, second = (replace(run_of(scale), scheduler_us=0.0) for _ in range(2))
    assert first == second
    other = replace(setup_of(scale).workload, seed=1)
    assert replace(run_of(scale, workload=other), scheduler_us=0.0) != first


def test_a_manager_that_is_too_slow_is_what_the_engines_wait_for(scale: Any) -> None:
    cost = setup_of(scale).manager
    quick, slow, slower = (run_of(scale, manager=cost.times(factor), steps=8) for factor in (1, 4000, 8000))
    assert quick.manager_share < 0.1
    for run, factor in ((slow, 4000), (slower, 8000)):
        assert run.manager_share > 0.95
        assert run.episodes / run.seconds < 1.3 / (cost.episode_s * factor)
        assert run.empty_places > quick.empty_places
        assert run.staleness_max <= 1
    assert slow.episodes / slow.seconds == pytest.approx(2 * slower.episodes / slower.seconds, rel=0.2)
