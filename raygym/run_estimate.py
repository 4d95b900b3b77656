"""From a run's config and its policy's shape to placement, memory and time: what `raygym config check` tells.

Here is the one place that knows which key of the config an estimate depends on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raygym.config import RunConfig
from raygym.deepspeed_options import unloadable_state
from raygym.memory_estimate import (
    GIB,
    USABLE_SHARE,
    EngineSetup,
    LearnerSetup,
    Memory,
    estimate_engine,
    estimate_learner,
)
from raygym.model_shape import ModelShape
from raygym.placement_plan import Bundle, Placement, plan_placement
from raygym.roofline import Device, cpu_device, engine_costs, training_flops
from raygym.simulate import SimulatedConfig
from raygym.time_split import StepCosts, TimeSplit, Workload, simulate_steps

# What the engines get on a CPU when the config says nothing (`actors/serving.py`).
_CPU_BATCH_TOKENS = 4096
_CPU_KV_CACHE_GIB = "1"
_HALF = ("bfloat16", "float16", "half")
_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the run is checked against."""

    gpus_per_node: int
    gpu_memory_gib: float
    gpu: Device
    sync_gib_per_s: float
    """At which new weights reach the engines; assumed."""

    @property
    def gpu_bytes(self) -> int:
        """Of one GPU."""
        return int(self.gpu_memory_gib * GIB)


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run needs. Without a known shape there is neither memory nor time."""

    placement: Placement
    learner: Memory | None
    engine: Memory | None
    """None for a simulated engine."""
    kv_tokens: int
    """Tokens that one engine's KV cache holds."""
    time: TimeSplit | None
    no_time: str
    """Why there is no time."""
    workload: Workload
    problems: tuple[str, ...]
    """What cannot work, each with the key and what to change."""
    warnings: tuple[str, ...]
    """What works badly."""


def estimate_run(config: RunConfig, shape: ModelShape | None, cluster: Cluster, workload: Workload) -> RunEstimate:
    """Estimate a run.

    Args:
        config: the run's.
        shape: its policy's; None where that is not known.
        cluster: its GPUs.
        workload: of its episodes.

    Raises:
        ConfigError: an actor's GPUs fit on no node.
    """
    placement = plan_placement(config, cluster.gpus_per_node)
    context = context_tokens(config, shape)
    if shape is None:
        why = "the policy's shape is not known"
        return RunEstimate(placement, None, None, 0, None, why, workload, (), ())
    learner = estimate_learner(learner_setup(config, shape))
    setup = engine_setup(config, shape) if config.policy.engine == "vllm" else None
    engine = estimate_engine(setup, cluster.gpu_bytes) if setup is not None else None
    kv_tokens = max(0, engine.kv_cache) // setup.kv_bytes_per_token if engine and setup else 0
    problems = _problems(config, placement, learner, engine, kv_tokens, context, cluster)
    warnings = _warnings(config, setup, kv_tokens, context, workload) if setup else []
    if unloadable := unloadable_state(config.learner.deepspeed):
        warnings.append(unloadable)
    time, no_time = None, "what does not fit takes no time"
    if not problems:
        time, no_time = _time(config, shape, setup, engine, cluster, workload, context)
    if time is not None:
        warnings += _late(config, time, learner)
    default_threads = config.learner.gpus_per_learner > 0 and not config.learner.threads
    if default_threads and learner_setup(config, shape).offload_optimizer:
        warnings.append(
            "learner.threads: a learner on a GPU has one CPU thread by default, and an offloaded optimizer's step is "
            "computed there; set it to a node's cores divided by its learners"
        )
    return RunEstimate(placement, learner, engine, kv_tokens, time, no_time, workload, tuple(problems), tuple(warnings))


def default_workload(config: RunConfig, shape: ModelShape | None, prompt_tokens: int | None = None) -> Workload:
    """Prompts of 512 tokens, or of a quarter of a shorter context; observations of a quarter of the prompt."""
    prompt_tokens = prompt_tokens or min(_PROMPT_TOKENS, max(1, context_tokens(config, shape) // 4))
    return Workload(prompt_tokens, observation_tokens=max(1, prompt_tokens // 4))


def context_tokens(config: RunConfig, shape: ModelShape | None) -> int:
    """Tokens of the longest episode that the engines take."""
    if config.policy.engine == "simulated":
        return SimulatedConfig(**config.policy.simulated).max_model_len
    given = config.policy.vllm.get("max_model_len")
    return int(given) if given else shape.context if shape else 4 * _PROMPT_TOKENS


def learner_setup(config: RunConfig, shape: ModelShape) -> LearnerSetup:
    """What of the config a learner's memory depends on."""
    learner = config.learner
    zero: dict[str, Any] = learner.deepspeed.get("zero_optimization", {})
    return LearnerSetup(
        shape=shape,
        ranks=learner.num_learners,
        zero_stage=learner.zero_stage,
        bytes_per_value=2 if learner.dtype == "bfloat16" else 4,
        tokens_per_micro_batch=learner.tokens_per_micro_batch,
        longest_sequence=context_tokens(config, shape),
        gradient_checkpointing=learner.gradient_checkpointing,
        trained_parameters=shape.lora_parameters(learner.lora.rank) if learner.lora is not None else None,
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_parameters=_offloads(zero, "offload_param"),
        # With adapters the policy without them is the reference.
        reference=learner.kl_coef > 0 and learner.lora is None,
        gpu=learner.gpus_per_learner > 0,
        bucket_values=_number(zero, "reduce_bucket_size", 5e8),
        live_values=_number(zero, "stage3_max_live_parameters", 1e9),
    )


def _number(zero: dict[str, Any], key: str, default: float) -> int:
    """DeepSpeed's default also where it says `auto`."""
    value = zero.get(key, default)
    return int(value if isinstance(value, int | float) else default)


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return isinstance(zero.get(key), dict) and zero[key].get("device", "none") not in (None, "none")


def engine_setup(config: RunConfig, shape: ModelShape) -> EngineSetup:
    """What of the config a vLLM engine's memory depends on."""
    policy, options = config.policy, config.policy.vllm
    on_gpu, context = policy.gpus_per_replica > 0, context_tokens(config, shape)
    dtype = str(options.get("dtype", "auto" if on_gpu else "float32"))
    given = {
        name: options[name]
        for name in ("gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs", "enforce_eager")
        if options.get(name) is not None
    }
    if not on_gpu:
        cache_gib = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB))
        given = {"max_num_batched_tokens": max(_CPU_BATCH_TOKENS, context), **given}
        given |= {"kv_cache_bytes": int(cache_gib * GIB), "enforce_eager": True}
    return EngineSetup(
        shape=shape,
        bytes_per_value=2 if dtype in (*_HALF, "auto") else 4,
        max_model_len=context,
        tensor_parallel=int(options.get("tensor_parallel_size", 1)),
        pipeline_parallel=int(options.get("pipeline_parallel_size", 1)),
        kv_bytes_per_value=1 if "fp8" in str(options.get("kv_cache_dtype", "auto")) else None,
        **given,
    )


def _problems(
    config: RunConfig,
    placement: Placement,
    learner: Memory,
    engine: Memory | None,
    kv_tokens: int,
    context: int,
    cluster: Cluster,
) -> list[str]:
    found = []
    if engine is not None and kv_tokens < context:
        found.append(
            f"policy: an engine's KV cache has room for {kv_tokens} tokens, but one request may have {context} "
            "(policy.vllm.max_model_len); lower that, raise policy.vllm.gpu_memory_utilization, or spread an engine "
            "over more GPUs (policy.vllm.tensor_parallel_size with policy.gpus_per_replica)"
        )
    for bundles in placement.kinds():
        learners = sum(bundle.role == "learner" for bundle in bundles)
        need = shared_bytes(config, bundles, learner, engine, cluster)
        most = cluster.gpu_bytes * (USABLE_SHARE if learners else 1)
        if need > most:
            who = " and ".join(f"{bundle.role} {bundle.number}" for bundle in bundles)
            found.append(
                f"{bundles[0].key}: {who} would need {need / GIB:.1f} GiB of a GPU's "
                f"{cluster.gpu_memory_gib:g}, of which {most / GIB:.1f} can be used; "
                + (_learner_advice(config, learner) if learners else "give engines a larger part of a GPU each")
            )
    return found


def shared_bytes(
    config: RunConfig, bundles: Sequence[Bundle], learner: Memory, engine: Memory | None, cluster: Cluster
) -> int:
    """What those who share a GPU need of it together. An engine takes what it was allowed, used or not."""
    need = 0
    for bundle in bundles:
        if bundle.role == "learner":
            need += learner.peak
        elif engine is not None:
            need += max(engine.total, engine.total - engine.kv_cache)
    return need


def _learner_advice(config: RunConfig, learner: Memory) -> str:
    """What would help most."""
    if learner.start > learner.total:
        narrower = ", learner.dtype: bfloat16" if config.learner.dtype == "float32" else ""
        return (
            f"most of it is needed at the start, when each learner loads the whole policy ({learner.start / GIB:.1f} "
            "GiB), which ZeRO stage 3 shares only then: more learners do not help; expected a smaller policy.model"
            f"{narrower} or GPUs with more memory"
        )
    parts = {
        "activations": "a smaller learner.tokens_per_micro_batch and policy.vllm.max_model_len",
        "weights": "a higher ZeRO stage (learner.deepspeed.zero_optimization.stage) or more learners",
        "gradients": "a higher ZeRO stage (learner.deepspeed.zero_optimization.stage) or more learners",
        "optimizer": "a higher ZeRO stage, more learners, or zero_optimization.offload_optimizer {device: cpu}",
        "buffers": "smaller buckets (zero_optimization.reduce_bucket_size, stage3_max_live_parameters)",
    }
    largest = max(parts, key=lambda part: int(getattr(learner, part)))
    return f"most of the learner's share is {largest} ({getattr(learner, largest) / GIB:.1f} GiB): try {parts[largest]}"


def _warnings(config: RunConfig, setup: EngineSetup, kv_tokens: int, context: int, workload: Workload) -> list[str]:
    found, rollout = [], config.rollout
    places = -(-rollout.max_concurrent // config.policy.replicas)
    if places > setup.max_num_seqs:
        found.append(
            f"policy.vllm.max_num_seqs: an engine runs {setup.max_num_seqs} requests at once, but "
            f"rollout.max_concurrent gives it {places}: the rest waits; raise it, or lower rollout.max_concurrent"
        )
    turns = max(env.max_turns or rollout.max_turns for env in config.envs)
    generated = max(env.max_tokens_per_turn or rollout.max_tokens_per_turn for env in config.envs)
    longest = workload.prompt_tokens + turns * generated + (turns - 1) * workload.observation_tokens
    if longest > context:
        found.append(
            f"policy.vllm.max_model_len: {context} tokens, but {turns} turns of {generated} tokens with a prompt of "
            f"{workload.prompt_tokens} may have {longest}: long episodes are cut; raise it, or lower "
            "rollout.max_tokens_per_turn or max_turns"
        )
    if kv_tokens and kv_tokens < places * min(longest, context):
        need = places * min(longest, context)
        found.append(
            f"rollout.max_concurrent: the {places} episodes of an engine would need {need} tokens of KV cache if all "
            f"were as long as they may be, and it has {kv_tokens}: then some wait or are preempted"
        )
    return found


def _late(config: RunConfig, time: TimeSplit, learner: Memory) -> list[str]:
    found = []
    for key, allowed_s, seconds in (
        ("sync.timeout_s", config.sync.timeout_s, time.sync_s),
        ("learner.update_timeout_s", config.learner.update_timeout_s, time.learn_s),
        ("validation.deadline_s", config.validation.deadline_s, time.validate_s),
        ("rollout.turn_timeout_s", config.rollout.turn_timeout_s, time.longest_turn_s),
        ("rollout.episode_timeout_s", config.rollout.episode_timeout_s, time.longest_episode_s),
    ):
        if seconds > allowed_s / 2:
            found.append(f"{key}: {allowed_s:g} s are near the {seconds:.0f} s that are expected; raise it")
    if learner.host and time.learn_s:
        found.append("learner.deepspeed: the time of offloaded states' way to and from the host is not in the estimate")
    return found


def _time(
    config: RunConfig,
    shape: ModelShape,
    setup: EngineSetup | None,
    engine: Memory | None,
    cluster: Cluster,
    workload: Workload,
    context: int,
) -> tuple[TimeSplit | None, str]:
    if workload.prompt_tokens >= context:
        return None, f"a prompt of {workload.prompt_tokens} tokens leaves no room in a context of {context}"
    cores = os.cpu_count() or 1
    learner, policy = config.learner, config.policy
    if setup is not None and engine is not None:
        on_gpu = policy.gpus_per_replica > 0
        device = cluster.gpu if on_gpu else cpu_device(max(1, cores // policy.replicas))
        costs = engine_costs(setup, device, engine.kv_cache, chunked_prefill=on_gpu)
    else:
        given = SimulatedConfig(**policy.simulated).batching
        if given is None:
            return None, "policy.simulated has no batching, so that turns take what they are told to"
        costs = given
    trainer = cluster.gpu if learner.gpus_per_learner else cpu_device(max(1, cores // learner.num_learners))
    memory = learner_setup(config, shape)
    # Logprobs of the starting policy; and of the learner's own before the step, which one mini-batch computes anyway.
    more_forwards = (learner.kl_coef > 0) + (learner.weighs_tokens and learner.mini_batches > 1)
    flops_per_s = trainer.flops * trainer.training_share * learner.num_learners

    def learn_s(lengths: list[int]) -> float:
        flops = sum(
            training_flops(shape, tokens, recompute=memory.gradient_checkpointing, more_forwards=more_forwards)
            for tokens in lengths
        )
        return flops / flops_per_s

    sync_s = shape.parameters * memory.bytes_per_value / GIB / cluster.sync_gib_per_s
    return simulate_steps(config, StepCosts(costs, policy.replicas, context, learn_s, sync_s), workload), ""
