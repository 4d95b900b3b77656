"""`raygym config check`: what it tells of shipped configs, of what does not fit, and of what is not on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiers import LONG

from raygym.architecture import read_architecture
from raygym.cli import main
from raygym.config import ConfigError, RunConfig
from raygym.config_file import load_config, parse_config
from raygym.engine_options import check_engine_options
from raygym.estimate_report import report
from raygym.memory_estimate import GIB
from raygym.model_shape import ModelShape, read_shape
from raygym.nemo_gym.config import NemoGymMissing
from raygym.roofline import H100
from raygym.run_estimate import Cluster, default_workload, estimate_run
from raygym.time_split import Workload

CONFIGS = Path(__file__).parent.parent / "configs"
GPU = sorted((CONFIGS / "gpu").glob("*.yaml"))
SEVEN_B = str(CONFIGS / "gpu" / "qwen2.5_7b_8gpu.yaml")
TINY = str(CONFIGS / "tiny.yaml")


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither NeMo Gym nor a model from the hub is on this machine, and nobody is asked for one."""

    def missing(*_: Any) -> None:
        raise NemoGymMissing("interpreter: is not prepared here")

    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("a check downloads nothing")

    monkeypatch.setattr("raygym.preflight.prepare", missing)
    monkeypatch.setattr("raygym.models._download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["config", "check", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture(autouse=True)
def a_shorter_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as few engines as there can be: what is asked here does not depend on it."""
    if not LONG:
        monkeypatch.setattr("raygym.time_split._MOST_TURNS", 1)


NODES = {
    "dapo17k_qwen3_4b": "16 GPUs on 2 nodes of 8",
    "workplace_assistant_qwen3_4b": "8 GPUs on 1 node of 8",
    "qwen2.5_7b_8gpu": "8 GPUs on 1 node of 8",
    "qwen3_14b_16gpu": "16 GPUs on 2 nodes of 8",
    "qwen3_30b_a3b_64gpu": "64 GPUs on 8 nodes of 8",
    "qwen3_32b_64gpu": "64 GPUs on 8 nodes of 8",
}


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize("path", GPU, ids=lambda path: path.stem)
def test_gpu_configs_pass_and_tell_what_they_need(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = checked([str(path)], capsys)
    assert (code, err) == (0, "")
    assert parse_config(yaml.safe_load(out)) == load_config(path)
    for word in ("placement", "engine", "learner", "optimizer", "activations", "kv cache", "Simulated", "generate"):
        assert word in out
    assert "not checked: policy.model" in out
    # No GPU is left idle.
    assert NODES[path.stem] in out
    assert " free" not in out


def test_the_two_runs_of_the_success_criteria() -> None:
    math = load_config(CONFIGS / "gpu" / "dapo17k_qwen3_4b.yaml")
    assert math.steps >= 1000
    assert math.envs[0].nemo_gym is not None
    assert "aime24" in math.envs[0].nemo_gym.validation_dataset
    assert load_config(CONFIGS / "gpu" / "workplace_assistant_qwen3_4b.yaml").steps >= 100
    for config in (math, load_config(CONFIGS / "gpu" / "workplace_assistant_qwen3_4b.yaml")):
        assert config.policy.model == "Qwen/Qwen3-4B-Instruct-2507"
        assert config.validation.tasks and config.validation.every


@pytest.mark.usefixtures("nothing_here")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learner.gradient_checkpointing=false"], ["learner.gpus_per_learner", "learner 0", "activations", "try"]),
        (["learner.deepspeed={}"], ["learner 0", "optimizer", "ZeRO stage"]),
        (["--gpu-memory-gib", "24"], ["learner.gpus_per_learner", "24", "optimizer", "offload_optimizer"]),
        (
            ["policy.vllm.gpu_memory_utilization=0.2"],
            ["policy.vllm.gpu_memory_utilization", "KV cache", "8192", "tensor_parallel_size"],
        ),
        (
            ["policy.gpus_per_replica=0.5", "learner.gpus_per_learner=0.5", "learner.num_learners=1"],
            ["engine 0", "learner 0", "GPU"],
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_to_change(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = checked([SEVEN_B, *arguments], capsys)
    assert code == 2
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    # What fits and what does not is still shown, as YAML.
    assert yaml.safe_load(out)["name"] == "qwen2.5_7b"
    assert "memory, GiB" in out


QWEN2_5_72B = {
    "model_type": "qwen2", "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 29568, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip


def test_a_policy_that_learners_cannot_load_is_told_although_its_shares_would_fit() -> None:
    config, shape = load_config(CONFIGS / "gpu" / "qwen3_32b_64gpu.yaml"), read_shape(QWEN2_5_72B)
    assert shape.parameters == pytest.approx(72.7e9, rel=1e-3)
    workload = Workload(512, turns=1)  # memory does not depend on it
    estimate = estimate_run(config, shape, CLUSTER, workload)
    assert estimate.learner is not None and estimate.learner.total < 0.95 * CLUSTER.gpu_bytes
    (problem,) = estimate.problems
    for word in ("learner.gpus_per_learner: learner 0", "136.9 GiB", "at the start", "more learners do not help"):
        assert word in problem
    large = Cluster(8, 192.0, H100, 1.0)
    assert estimate_run(config, shape, large, workload).problems == ()


def test_the_largest_shipped_policy_fits_at_the_start_but_barely() -> None:
    config = load_config(CONFIGS / "gpu" / "qwen3_32b_64gpu.yaml")
    architecture = read_architecture(config.policy.model, None)
    assert architecture is not None
    shape = read_shape(architecture.config)
    estimate = estimate_run(config, shape, CLUSTER, Workload(512, turns=1))  # memory does not depend on it
    assert estimate.learner is not None and estimate.problems == ()
    assert estimate.learner.peak == estimate.learner.start > estimate.learner.total
    assert estimate.learner.start / CLUSTER.gpu_bytes == pytest.approx(0.78, abs=0.01)
    lines = report(config, estimate, CLUSTER)
    assert "  a learner at the start: 62.5 of 80, for it loads the whole policy before ZeRO-3 shares it" in lines
    assert "  a node's host at the start: 488.2, through which 8 learners load 61.0 each" in lines


@pytest.mark.usefixtures("nothing_here")
def test_a_bundle_larger_than_a_node_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = checked([SEVEN_B, "policy.gpus_per_replica=4", "policy.vllm.tensor_parallel_size=4",
                              "--gpus-per-node=2"], capsys)  # fmt: skip
    assert (code, out) == (2, "")
    assert "policy.gpus_per_replica" in err and "node of 2" in err


@pytest.mark.parametrize(
    ("gpus", "vllm", "words"),
    [
        (1, {"tensor_parallel_size": 2}, ["policy.gpus_per_replica: 1", "is 2"]),
        (4, {}, ["policy.gpus_per_replica: 4", "is 1"]),
        (4, {"tensor_parallel_size": 2}, ["4", "is 2"]),
        (0.5, {"pipeline_parallel_size": 2}, ["0.5", "is 2"]),
        (2, {"tensor_parallel_size": "2"}, ["policy.vllm.tensor_parallel_size", "'2'"]),
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, []),
        (0.5, {}, []),
        (0, {"tensor_parallel_size": 2}, []),
    ],
)
def test_an_engine_has_a_gpu_for_each_of_its_ranks(gpus: float, vllm: dict[str, Any], words: list[str]) -> None:
    policy = small({"policy": {"model": "tiny", "gpus_per_replica": gpus, "vllm": vllm}}).policy
    if not words:
        check_engine_options(policy)
        return
    with pytest.raises(ConfigError) as caught:
        check_engine_options(policy)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.usefixtures("nothing_here")
def test_what_is_not_here_is_refused_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "gpu" / "workplace_assistant_qwen3_4b.yaml")
    code, _, err = checked([path, "--strict"], capsys)
    assert code == 2
    assert "envs.0.nemo_gym.interpreter" in err


@pytest.mark.usefixtures("nothing_here")
def test_an_unknown_model_is_placed_but_not_weighed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = checked([SEVEN_B, "policy.model=Qwen/Qwen2.5-7B-Instrct"], capsys)
    assert code == 0
    assert "did you mean Qwen/Qwen2.5-7B-Instruct" in out
    assert "8 GPUs on 1 node" in out
    assert "memory, GiB" not in out
    assert "not estimated" in out


def test_a_run_on_cpus_is_told_the_hosts_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = checked([TINY, "--tokens-per-turn", "2", "--prompt-tokens", "10"], capsys)
    assert code == 0
    assert "without a GPU: 1 learner, 1 engine, 1 EnvRunner" in out
    assert "of the host's" in out
    assert "prompts of 10 tokens, 3 turns of 2 tokens" in out


@pytest.mark.parametrize("option", ["--gpus-per-node=0", "--gpu-memory-gib=-1", "--mfu=nan", "--turns=many"])
def test_bad_options(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config", "check", TINY, option])
    assert caught.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


SHAPE = ModelShape(layers=4, hidden=256, heads=8, kv_heads=2, head_size=32, intermediate=512, vocab=1000, tied=False,
                   context=2048)  # fmt: skip
CLUSTER = Cluster(8, 80.0, H100, 1.0)


OFFLOAD = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}


NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}}


def small(changes: dict[str, Any]) -> RunConfig:
    base = {
        "name": "t",
        "steps": 2,
        "policy": {"model": "tiny", "gpus_per_replica": 1},
        "envs": [{"id": "raygym/NumberGuess-v0"}],
        "learner": {"gpus_per_learner": 1},
    }
    return parse_config({**base, **changes})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rollout": {"max_concurrent": 500}}, "policy.vllm.max_num_seqs"),
        ({"rollout": {"max_tokens_per_turn": 1024}}, "policy.vllm.max_model_len"),
        ({"rollout": {"turn_timeout_s": 1e-3}, "sync": {"timeout_s": 1e-3}}, "rollout.turn_timeout_s"),
        ({"sync": {"timeout_s": 1e-3}}, "sync.timeout_s"),
        ({"learner": {"gpus_per_learner": 1, "update_timeout_s": 1e-6}}, "learner.update_timeout_s"),
        ({"rollout": {"episode_timeout_s": 1e-3}}, "rollout.episode_timeout_s"),
        ({"learner": {"gpus_per_learner": 1, "deepspeed": OFFLOAD}}, "learner.threads"),
        ({"learner": {"gpus_per_learner": 1, "deepspeed": NVME}}, "learner.deepspeed.zero_optimization.offload_opt"),
    ],
)
def test_what_works_badly_is_a_warning(changes: dict[str, Any], word: str) -> None:
    config = small(changes)
    estimate = estimate_run(config, SHAPE, CLUSTER, default_workload(config, SHAPE))
    assert estimate.problems == ()
    assert any(warning.startswith(word) for warning in estimate.warnings), estimate.warnings


def test_a_simulated_engine_needs_no_memory_and_has_its_own_pace() -> None:
    batching = {"step_s": 0.01, "kv_blocks": 4096}
    config = small({"policy": {"model": "tiny", "engine": "simulated", "simulated": {"batching": batching}}})
    estimate = estimate_run(config, SHAPE, CLUSTER, default_workload(config, SHAPE))
    assert estimate.engine is None
    assert estimate.time is not None and estimate.time.generate_s > 0.01
    config = small({"policy": {"model": "tiny", "engine": "simulated"}})
    estimate = estimate_run(config, SHAPE, CLUSTER, default_workload(config, SHAPE))
    assert estimate.time is None and "batching" in estimate.no_time


def test_adapters_and_checkpointing_are_read_from_the_config() -> None:
    learner = {"gpus_per_learner": 1, "kl_coef": 0.1}
    whole, adapters, checkpointed = (
        estimate_run(config, SHAPE, CLUSTER, default_workload(config, SHAPE)).learner
        for config in (
            small({"learner": {**learner, **change}})
            for change in ({}, {"lora": {"rank": 4}}, {"gradient_checkpointing": True})
        )
    )
    assert whole and adapters and checkpointed
    assert whole.weights == 2 * 4 * SHAPE.parameters  # with the starting policy
    assert adapters.weights == 4 * (SHAPE.parameters + SHAPE.lora_parameters(4))
    assert adapters.optimizer == 8 * SHAPE.lora_parameters(4)
    assert checkpointed.activations < whole.activations


def test_a_larger_gpu_leaves_more_for_the_kv_cache() -> None:
    config = small({})
    load = default_workload(config, SHAPE)
    small_gpu, large_gpu = (estimate_run(config, SHAPE, Cluster(8, gib, H100, 1.0), load) for gib in (40.0, 80.0))
    assert small_gpu.engine and large_gpu.engine
    assert large_gpu.engine.kv_cache - small_gpu.engine.kv_cache == pytest.approx(0.92 * 40 * GIB, abs=2)
    assert large_gpu.kv_tokens > small_gpu.kv_tokens
