"""The simulated time of a step, against what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raygym.batching_config import BatchingConfig
from raygym.config import RunConfig
from raygym.config_file import parse_config
from raygym.memory_estimate import GIB, EngineSetup
from raygym.model_shape import ModelShape
from raygym.roofline import H100, engine_costs, training_flops
from raygym.time_split import StepCosts, Workload, simulate_steps

SHAPE = ModelShape(layers=4, hidden=256, heads=8, kv_heads=2, head_size=32, intermediate=512, vocab=1000, tied=False,
                   context=4096)  # fmt: skip
# A step of an engine takes 10 ms, whatever is in it.
ENGINE = BatchingConfig(step_s=0.01, max_num_seqs=64, kv_blocks=4096)
# Every turn has exactly ten tokens.
TEN = Workload(prompt_tokens=20, turns=1, tokens_per_turn=10, sigma=0.0)


def config(validation: dict[str, Any] | None = None, **rollout: Any) -> RunConfig:
    given = {"groups_per_step": 2, "group_size": 4, "max_turns": 4, "max_tokens_per_turn": 20, "max_concurrent": 64}
    return parse_config(
        {
            "name": "t",
            "steps": 9,
            "policy": {"model": "tiny"},
            "envs": [{"id": "raygym/NumberGuess-v0"}],
            "rollout": {**given, **rollout},
            "validation": validation or {},
        }
    )


def costs(**changes: Any) -> StepCosts:
    return replace(StepCosts(ENGINE, 1, 1024, lambda lengths: 2.0, sync_s=0.5), **changes)


def about(seconds: float, turns: int = 1) -> Any:
    """Whoever comes while a step runs is in the next one: a step more for each turn."""
    return pytest.approx(seconds + 0.005 * turns, abs=0.0051 * turns)


def test_all_episodes_at_once_take_as_many_steps_as_one_has_tokens() -> None:
    split = simulate_steps(config(), costs(), TEN)
    assert split.generate_s == about(0.1)
    assert (split.learn_s, split.sync_s, split.validate_s) == (2.0, 0.5, 0.0)
    assert split.step_s == pytest.approx(split.generate_s + 2.5)
    assert split.generated_tokens == 8 * 10
    assert split.sequence_tokens == 30


def test_half_the_places_take_twice_as_long() -> None:
    assert simulate_steps(config(max_concurrent=4), costs(), TEN).generate_s == about(0.2, turns=2)


def test_turns_follow_one_another_with_the_environment_in_between() -> None:
    split = simulate_steps(config(), costs(), replace(TEN, turns=3, env_s=0.25, observation_tokens=5))
    assert split.generate_s == about(3 * 0.1 + 2 * 0.25, turns=3)
    assert split.sequence_tokens == 20 + 3 * 10 + 2 * 5


def test_an_episode_ends_where_its_context_does() -> None:
    split = simulate_steps(config(), costs(max_model_len=48), replace(TEN, turns=4, observation_tokens=5))
    assert split.sequence_tokens == 20 + 10 + 5 + 10  # 5 more would leave no room


def test_learning_gets_the_lengths_of_a_whole_step() -> None:
    seen: list[list[int]] = []
    simulate_steps(config(), costs(learn_s=lambda lengths: seen.append(lengths) or 1.0), TEN)
    assert seen[-1] == [30] * 8


def test_with_staleness_episodes_are_played_beside_the_learning() -> None:
    slow = costs(engine=replace_step(0.1))  # a step's episodes take 1 s
    assert simulate_steps(config(), slow, TEN).generate_s == about(1.0, turns=10)
    assert simulate_steps(config(max_staleness=1), slow, TEN).generate_s == pytest.approx(0.0)
    # Learning of 0.3 s and a sync of 0.5 s hide a part of it only.
    part = simulate_steps(config(max_staleness=1), replace(slow, learn_s=lambda lengths: 0.3), TEN)
    assert 0.0 < part.generate_s < 1.0


def test_two_engines_share_the_episodes() -> None:
    crowded = costs(engine=BatchingConfig(step_s=0.01, max_num_seqs=4, max_num_batched_tokens=4096))
    assert simulate_steps(config(), crowded, TEN).generate_s == about(0.2, turns=2)
    assert simulate_steps(config(), replace(crowded, replicas=2), TEN).generate_s == about(0.1)


def test_a_validation_is_played_by_itself() -> None:
    split = simulate_steps(config({"tasks": 6, "every": 2}), costs(), TEN)
    assert split.validate_s == about(0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"extra_episodes": 2},
        {"order": "completion", "over_sampling": 1.0, "max_staleness": 1},
        {"dynamic_sampling": True},
        {"group_deadline_s": 1000.0},
    ],
)
def test_the_scheduler_is_the_real_one(options: dict[str, Any]) -> None:
    split = simulate_steps(config(**options), costs(), replace(TEN, sigma=0.5))
    assert split.step_s >= 2.5
    assert split.generated_tokens >= 8 * 2


def test_it_repeats_itself() -> None:
    load = replace(TEN, turns=3, sigma=0.7)
    assert simulate_steps(config(), costs(), load) == simulate_steps(config(), costs(), load)


def replace_step(step_s: float) -> BatchingConfig:
    return ENGINE.model_copy(update={"step_s": step_s})


def test_an_engine_reads_its_weights_once_a_step_and_its_cache_for_each_token() -> None:
    setup = EngineSetup(SHAPE, bytes_per_value=2, max_model_len=1024, max_num_seqs=64)
    found = engine_costs(setup, H100, GIB)
    reached = H100.bytes_per_s * H100.bandwidth_share
    read = 2 * (SHAPE.parameters - SHAPE.vocab * SHAPE.hidden)
    assert found.step_s == pytest.approx(H100.step_overhead_s + read / reached)
    assert found.kv_token_s == pytest.approx(setup.kv_bytes_per_token / reached)
    assert found.kv_blocks * found.block_size == pytest.approx(GIB / setup.kv_bytes_per_token, rel=0.01)
    two = engine_costs(replace(setup, tensor_parallel=2), replace(H100, step_overhead_s=0.0, all_reduce_s=0.0), GIB)
    assert two.step_s == pytest.approx(read / reached / 2)
    assert two.prefill_token_s == pytest.approx(found.prefill_token_s / 2)


def test_training_is_six_flops_a_parameter_and_eight_with_recomputation() -> None:
    tokens = 10
    attention = 2 * SHAPE.layers * SHAPE.query_size * tokens * tokens
    matrices = SHAPE.parameters - SHAPE.vocab * SHAPE.hidden
    assert training_flops(SHAPE, tokens) == 6 * matrices * tokens + 3 * attention
    assert training_flops(SHAPE, tokens, recompute=True) == 8 * matrices * tokens + 4 * attention
    assert training_flops(SHAPE, tokens, more_forwards=1) == 8 * matrices * tokens + 4 * attention
