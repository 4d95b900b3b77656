"""The run config: what it accepts, and that what it refuses is told in one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raygym.config import ConfigError, DeltaConfig
from raygym.config_file import dump_config, load_config, parse_config

MINIMAL: dict[str, Any] = {
    "name": "t",
    "steps": 2,
    "policy": {"model": "tiny"},
    "envs": [{"id": "raygym/NumberGuess-v0"}],
}


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("configs/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).steps > 0


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "learner": {"betas": [0.8, 0.9], "lr": 1e-5}})
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("learner.lr=1e-6", lambda c: c.learner.lr, 1e-6),
        ("learner.deepspeed.zero_optimization.stage=2", lambda c: c.learner.zero_stage, 2),
        ("envs.0.kwargs.high=50", lambda c: c.envs[0].kwargs["high"], 50),
        ("policy.vllm={max_model_len: 64}", lambda c: c.policy.vllm, {"max_model_len": 64}),
        ("name=3d-run", lambda c: c.name, "3d-run"),
        ("policy.model=org/model=x", lambda c: c.policy.model, "org/model=x"),
    ],
)
def test_overrides(tmp_path: Path, override: str, read: Any, expected: Any) -> None:
    assert read(load_config(write(tmp_path, MINIMAL), [override])) == expected


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "learner: {lr: 2e-5}\n"
    assert load_config(write(tmp_path, text)).learner.lr == 2e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"foo": 1}, ["foo", "unknown key", "expected one of", "rollout"]),
        ({"learner": {"lrr": 1e-6}}, ["learner.lrr", "unknown key", "lr"]),
        ({"envs": [{"id": "x", "wait": 1}]}, ["envs.0.wait", "unknown key", "weight"]),
        ({"policy": {"model": "tiny", "http": {"prot": 1}}}, ["policy.http.prot", "unknown key", "port"]),
        ({"steps": "three"}, ["steps", "integer", "'three'"]),
        ({"steps": -1}, ["steps", "greater than or equal to 0"]),
        ({"learner": {"lr": 0}}, ["learner.lr", "greater than 0"]),
        ({"learner": {"advantage": "gae"}}, ["learner.advantage", "dr_grpo", "'gae'"]),
        ({"learner": {"loss": "ppo"}}, ["learner.loss", "cispo", "'ppo'"]),
        ({"learner": {"dual_clip": 1}}, ["learner.dual_clip", "greater than 1"]),
        ({"learner": {"dual_clip": 3, "loss": "cispo"}}, ["learner.dual_clip", "loss: clip", "loss: cispo"]),
        ({"learner": {"loss": "gspo"}}, ["learner.loss_mean", "token", "expected loss_mean: sequence"]),
        ({"learner": {"loss_length": 64}}, ["learner.loss_length", "64", "loss_mean: token"]),
        ({"learner": {"num_learners": 7}}, ["learner.num_learners", "does not divide", "divisor of 64"]),
        ({"learner": {"gpus_per_learner": 2}}, ["learner.gpus_per_learner", "less than or equal to 1", "found 2"]),
        (
            {"learner": {"gpus_per_learner": 0.5, "num_learners": 2}},
            ["learner.gpus_per_learner: 0.5", "2 learners", "NCCL", "num_learners: 1"],
        ),
        ({"learner": {"mini_batches": 3}}, ["learner.mini_batches", "rollout.groups_per_step 8"]),
        ({"learner": {"deepspeed": {"train_batch_size": 8}}}, ["learner.deepspeed.train_batch_size", "remove it"]),
        ({"learner": {"deepspeed": {"zero_optimization": {"stage": 4}}}}, ["zero_optimization", "0, 1, 2 or 3"]),
        (
            {"learner": {"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}}},
            ["zero_optimization.offload_param", "stage 3", "stage: 2"],
        ),
        (
            {"learner": {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}}},
            ["offload_optimizer.nvme_path", "missing"],
        ),
        ({"learner": {"deepspeed": {"zero_optimization": 3}}}, ["deepspeed.zero_optimization", "mapping", "3"]),
        ({"learner": {"deepspeed": {"fp16": {"enabled": True}}}}, ["learner.deepspeed.fp16", "learner.dtype"]),
        ({"learner": {"lr_min": 1e-7}}, ["learner.lr_min", "lr_schedule: constant"]),
        ({"learner": {"lr_min": 1, "lr_schedule": "linear"}}, ["learner.lr_min", "above lr 1e-06"]),
        (
            {"learner": {"warmup_steps": 4, "lr_schedule": "cosine", "mini_batches": 2}},
            ["learner.warmup_steps: 4", "4 updates", "less than 4"],
        ),
        ({"learner": {"lora": {"rank": 0}}}, ["learner.lora.rank", "greater than or equal to 1"]),
        ({"learner": {"lora": {"targets": ["q_proj"]}}}, ["learner.lora.targets", "unknown key", "target_modules"]),
        ({"policy": {"model": "tiny", "vllm": {"generation_config": "auto"}}}, ["policy.vllm.generation_config"]),
        ({"policy": {}}, ["policy.model", "missing"]),
        ({"sync": {"on_update": "wait"}}, ["sync.on_update", "finish_turn", "'wait'"]),
        ({"sync": {"on_update": "finish_turn", "timeout_s": 20}}, ["sync.finish_timeout_s", "sync.timeout_s (20)"]),
        (
            {"sync": {"on_update": "finish_turn"}, "rollout": {"turn_timeout_s": 25}},
            ["sync.finish_timeout_s", "rollout.turn_timeout_s (25)"],
        ),
        ({"sync": {"mode": "sparse"}}, ["sync.mode", "'full' or 'delta'", "'sparse'"]),
        ({"sync": {"delta": {"full_every": 4}}}, ["sync.delta", "sync.mode: full", "mode: delta"]),
        ({"sync": {"mode": "delta", "delta": {"threshold": -1e-6}}}, ["sync.delta.threshold", "equal to 0"]),
        ({"sync": {"mode": "delta", "delta": {"threshold": float("inf")}}}, ["sync.delta.threshold", "finite"]),
        ({"sync": {"mode": "delta", "delta": {"full_every": 0}}}, ["sync.delta.full_every", "equal to 1"]),
        ({"sync": {"mode": "delta", "delta": {"treshold": 0}}}, ["sync.delta.treshold", "unknown", "threshold"]),
        ({"envs": []}, ["envs", "at least 1"]),
        ({"envs": [{"id": "a"}, {"id": "a"}]}, ["envs", "name"]),
        ({"name": "a/b"}, ["name", "folder"]),
        ({"rollout": None}, ["rollout", "None"]),
        (
            {"rollout": {"concurrency": "adaptive", "max_concurrent": 4}},
            ["rollout.min_concurrent: 8", "rollout.max_concurrent 4"],
        ),
        ({"rollout": {"concurrency": "fast"}}, ["rollout.concurrency", "'fixed' or 'adaptive'", "'fast'"]),
    ],
)
def test_bad_values_are_told_by_key(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **change})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_delta_has_defaults_and_is_written_as_it_is_read() -> None:
    config = parse_config({**MINIMAL, "sync": {"mode": "delta"}})
    assert config.sync.delta == DeltaConfig(threshold=0.0, full_every=16)
    for again in (config, parse_config(MINIMAL)):
        assert parse_config(yaml.safe_load(dump_config(again))) == again
    assert parse_config(MINIMAL).sync.delta is None


def test_one_learner_may_share_its_gpu() -> None:
    assert parse_config({**MINIMAL, "learner": {"gpus_per_learner": 0.5}}).learner.gpus_per_learner == 0.5


def test_a_fixed_concurrency_may_be_below_the_least_of_an_adaptive_one() -> None:
    assert parse_config({**MINIMAL, "rollout": {"max_concurrent": 2}}).rollout.concurrency == "fixed"


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", ["not valid YAML"]), ("just text", ["mapping"]), ("", ["mapping"])],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert all(word in str(caught.value) for word in ["run.yaml", *words])


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


@pytest.mark.parametrize(
    "override", ["learner.lr", "=1", "name.x.y=1", "envs.4.id=x", "envs.x=1", "steps=[", "learner.lr=x"]
)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, MINIMAL), [override])
