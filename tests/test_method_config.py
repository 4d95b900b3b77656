"""The method's part of the config: published methods as presets, what is resolved, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError
from test_config import MINIMAL

from raygym.algorithms.presets import PRESETS
from raygym.config import ConfigError, LearnerConfig, RunConfig
from raygym.config_file import dump_config, parse_config
from raygym.method_config import AlgorithmName, MethodConfig


def run(learner: dict[str, Any], **rollout: Any) -> RunConfig:
    return parse_config({**MINIMAL, "learner": learner, "rollout": rollout})


def test_each_algorithm_has_a_preset_of_keys_that_there_are() -> None:
    assert set(PRESETS) == set(get_args(AlgorithmName))
    for name, preset in PRESETS.items():
        assert set(preset) <= set(MethodConfig.model_fields) - {"algorithm"}
        method = MethodConfig(algorithm=name)
        assert {key: getattr(method, key) for key in preset} == preset


def test_grpo_is_the_defaults() -> None:
    assert MethodConfig(algorithm="grpo") == MethodConfig()
    learner = run({}).learner
    assert (learner.advantage, learner.loss, learner.loss_mean, learner.clip_low, learner.clip_high) == (
        "grpo", "clip", "token", 0.2, 0.2,
    )  # fmt: skip
    assert learner.decoupled is False and learner.correction == "none" and learner.kl_coef == 0
    assert learner.entropy_coef == 0 and learner.overlong == "none" and learner.credit == "episode"


def test_keys_that_are_set_win() -> None:
    learner = run({"algorithm": "dapo", "clip_high": 0.3, "overlong": "none"}).learner
    assert (learner.clip_low, learner.clip_high, learner.overlong) == (0.2, 0.3, "none")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resolved_config_is_shown_and_reads_back_equal(name: str, staleness: int) -> None:
    config = run({"algorithm": name}, max_staleness=staleness, max_turns=3, max_tokens_per_turn=7)
    text = dump_config(config)
    shown = yaml.safe_load(text)["learner"]
    assert "auto" not in (shown["decoupled"], shown["correction"])
    assert parse_config(yaml.safe_load(text)) == config
    assert config.learner.resolved() == config.learner
    if config.learner.loss_mean == "constant":
        assert config.learner.loss_length == 21
    if config.learner.overlong == "shaped":
        assert (config.learner.overlong_length, config.learner.overlong_buffer) == (21, 4)


def test_the_longest_environment_says_how_long_an_episode_can_be() -> None:
    envs = [{"id": "a", "max_turns": 2}, {"id": "b", "max_tokens_per_turn": 100}]
    config = parse_config({**MINIMAL, "envs": envs, "learner": {"loss_mean": "constant"}})
    assert config.most_generated == config.learner.loss_length == 4 * 100


@pytest.mark.parametrize(
    ("learner", "staleness", "resolved"),
    [
        ({}, 0, (False, "none", None, None)),
        ({}, 1, (True, "truncated_token", 2.0, None)),
        ({"correction_cap": 3.0}, 1, (True, "truncated_token", 3.0, None)),
        ({"correction": "none"}, 1, (True, "none", None, None)),
        ({"decoupled": False}, 4, (False, "none", None, None)),
        ({"decoupled": True}, 0, (True, "truncated_token", 2.0, None)),
        ({"correction": "masked"}, 0, (True, "masked", 5.0, 0.5)),
        ({"correction": "masked", "correction_low": 0.1}, 0, (True, "masked", 5.0, 0.1)),
        ({"correction": "rejected_sequence", "decoupled": False}, 1, (False, "rejected_sequence", 1.001, 1 / 1.001)),
    ],
)
def test_staleness_is_the_only_switch(learner: dict[str, Any], staleness: int, resolved: tuple[Any, ...]) -> None:
    found = run(learner, max_staleness=staleness).learner
    assert (found.decoupled, found.correction, found.correction_cap, found.correction_low) == resolved
    made = RunConfig(**{**MINIMAL, "learner": LearnerConfig(**learner), "rollout": {"max_staleness": staleness}})
    assert made.learner == found, "made in Python, it means the same"


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ({"algorithm": "ppo"}, ["learner.algorithm", "'dapo'", "'ppo'"]),
        ({"algorithm": "gspo", "loss_mean": "token"}, ["learner.loss_mean: token", "expected loss_mean: sequence"]),
        ({"gamma": 0.9}, ["learner.gamma: 0.9", "credit: turn"]),
        ({"gamma": 1.1, "credit": "turn"}, ["learner.gamma", "less than or equal to 1"]),
        ({"credit": "turn", "reward_weights": {"a": 1.0}}, ["learner.reward_weights", "credit: episode"]),
        ({"algorithm": "gdpo", "credit": "turn"}, ["learner.credit: turn", "advantage: gdpo"]),
        ({"algorithm": "gdpo", "kl_in": "reward", "kl_coef": 0.1}, ["learner.kl_in: reward", "advantage: gdpo"]),
        ({"algorithm": "gdpo", "overlong": "shaped"}, ["learner.overlong: shaped", "advantage: gdpo"]),
        ({"correction": "masked", "decoupled": False}, ["learner.correction: masked", "decoupled: true or auto"]),
        ({"correction": "none", "correction_cap": 2.0}, ["learner.correction_cap", "correction: none", "remove it"]),
        ({"correction": "truncated_token", "correction_low": 0.5}, ["learner.correction_low", "truncated_token"]),
        (
            {"correction": "masked", "correction_low": 0.9, "correction_cap": 0.8},
            ["learner.correction_low: 0.9", "correction_cap (0.8)"],
        ),
        ({"overlong_buffer": 5}, ["learner.overlong_buffer", "overlong: shaped", "overlong: none"]),
        ({"overlong": "shaped", "overlong_buffer": 500}, ["learner.overlong_buffer: 500", "overlong_length (64)"]),
    ],
)
def test_what_does_not_fit_together_is_refused_by_key(learner: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(learner)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_reinforce_alone_may_be_weighed_without_decoupling() -> None:
    learner = run({"loss": "reinforce", "correction": "truncated_token", "decoupled": False}).learner
    assert learner.weighs_tokens and learner.decoupled is False


def test_unresolved_methods_are_no_ones() -> None:
    with pytest.raises(AssertionError, match="resolved"):
        _ = MethodConfig().weighs_tokens
    with pytest.raises(ValidationError):
        MethodConfig(algorithm=["grpo"])  # type: ignore[arg-type]
