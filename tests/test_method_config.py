"""The method's part of the config: published methods as presets, what is resolved, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_config import MINIMAL
from tiers import examples

from raygym.algorithms.presets import PRESETS
from raygym.config import ConfigError, LearnerConfig, RunConfig
from raygym.config_file import dump_config, load_config, parse_config
from raygym.method_config import AlgorithmName, MethodConfig


def run(learner: dict[str, Any], **rollout: Any) -> RunConfig:
    return parse_config({**MINIMAL, "learner": learner, "rollout": rollout})


def shown(text: str) -> Any:
    """What a written config says in comments of the method's keys that nobody set."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  # resolved:")) + 1
    block = itertools.takewhile(lambda line: line.startswith("  #   "), lines[start:])
    return yaml.safe_load("\n".join(line.removeprefix("  #   ") for line in block))


CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "algorithm": st.sampled_from(sorted(PRESETS)),
        "advantage": st.sampled_from(["grpo", "rloo"]),
        "loss": st.sampled_from(["clip", "cispo", "reinforce"]),
        "loss_mean": st.sampled_from(["token", "sequence", "constant"]),
        "loss_length": st.sampled_from([None, 9]),
        "clip_high": st.sampled_from([0.2, 0.3]),
        "decoupled": st.sampled_from([True, False, "auto"]),
        "correction": st.sampled_from(["auto", "none", "masked"]),
        "correction_cap": st.sampled_from([None, 3.0]),
        "correction_low": st.sampled_from([None, 0.25]),
        "overlong": st.sampled_from(["none", "shaped"]),
        "overlong_length": st.sampled_from([None, 30]),
        "num_learners": st.sampled_from([1, 2]),
    },
)
OVERRIDES = st.lists(
    st.one_of(
        st.sampled_from(sorted(PRESETS)).map("learner.algorithm={}".format),
        st.sampled_from([0, 1, 4]).map("rollout.max_staleness={}".format),
        st.sampled_from([5, 50]).map("rollout.max_tokens_per_turn={}".format),
        st.sampled_from(["auto", "none", "masked"]).map("learner.correction={}".format),
        st.sampled_from(["sequence", "constant"]).map("learner.loss_mean={}".format),
    ),
    max_size=3,
)


@settings(max_examples=examples(30, 150), deadline=None)
@given(learner=CHOICES, staleness=st.sampled_from([0, 2]), overrides=OVERRIDES)
def test_a_written_config_takes_overrides_as_the_original_does(
    learner: dict[str, Any], staleness: int, overrides: list[str]
) -> None:
    original = {**MINIMAL, "learner": learner, "rollout": {"max_staleness": staleness}}
    with TemporaryDirectory() as folder:
        first, written = Path(folder) / "first.yaml", Path(folder) / "config.yaml"
        first.write_text(yaml.safe_dump(original))
        try:
            config = load_config(first)
        except ConfigError:
            assume(False)
        written.write_text(dump_config(config))
        assert load_config(written) == config
        assert dump_config(load_config(written)) == dump_config(config)
        assert loaded(written, overrides) == loaded(first, overrides)


def loaded(path: Path, overrides: list[str]) -> RunConfig | str:
    """The config, or what is wrong with it."""
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        return str(error).removeprefix(f"{path}: ")


def test_staleness_and_algorithm_have_their_effect_on_a_written_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run({"clip_high": 0.3})))
    stale = load_config(path, ["rollout.max_staleness=4"]).learner
    assert (stale.decoupled, stale.correction, stale.correction_cap) == (True, "truncated_token", 2.0)
    gspo = load_config(path, ["learner.algorithm=gspo"]).learner
    assert (gspo.loss, gspo.loss_mean, gspo.clip_low, gspo.clip_high) == ("gspo", "sequence", 3e-4, 0.3)


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
    assert set(yaml.safe_load(text)["learner"]) & set(MethodConfig.model_fields) == {"algorithm"}
    assert shown(text) == {key: getattr(config.learner, key) for key in MethodConfig.model_fields if key != "algorithm"}
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
