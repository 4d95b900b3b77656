"""A run's estimate as lines for people."""

from __future__ import annotations

from raygym.config import RunConfig
from raygym.memory_estimate import GIB, USABLE_SHARE, Memory
from raygym.placement_plan import describe
from raygym.run_estimate import Cluster, RunEstimate
from raygym.time_split import TimeSplit

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "buffers", "total")


def report(config: RunConfig, estimate: RunEstimate, cluster: Cluster) -> list[str]:
    """Placement, memory, time, and what works badly. No line but warnings is wider than 120 columns."""
    lines = ["", "placement"]
    lines += [f"  {line}" for line in describe(estimate.placement, cluster.gpus_per_node)]
    lines += _memory(config, estimate, cluster)
    lines += ["", *_time(config, estimate, cluster)]
    if estimate.warnings:
        lines.append("")
    return lines + [f"warning: {text}" for text in estimate.warnings]


def _memory(config: RunConfig, estimate: RunEstimate, cluster: Cluster) -> list[str]:
    if estimate.learner is None:
        return []
    policy, learner = config.policy, config.learner
    rows = [_row("a learner", estimate.learner, learner.gpus_per_learner > 0, cluster)]
    if estimate.engine is not None:
        rows.append(_row("an engine's GPU" if policy.gpus_per_replica else "an engine", estimate.engine,
                         policy.gpus_per_replica > 0, cluster))  # fmt: skip
    head = f"{'memory, GiB':18}" + "".join(f"{name.replace('_', ' '):>12}" for name in _COLUMNS)
    lines = ["", head, *rows]
    if learner.zero_stage == 3:
        lines += _start(estimate, cluster)
    if estimate.engine is not None:
        lines.append(f"  an engine's KV cache holds {estimate.kv_tokens:,} tokens")
    if estimate.learner.host:
        lines.append(f"  offloaded to the host: {estimate.learner.host / GIB:.1f} GiB for each learner")
    if learner.gpus_per_learner:
        lines.append(
            f"  assumed: {USABLE_SHARE:.0%} of a learner's GPU can be used, one sequence is as long as the context, "
            "and attention keeps no scores"
        )
    return lines


def _start(estimate: RunEstimate, cluster: Cluster) -> list[str]:
    """Of learners that share the policy, but only once each of them has loaded it."""
    assert estimate.learner is not None
    start, host, count = estimate.learner.start, estimate.learner.start_host, estimate.placement.learners_on_a_node
    of = f" of {cluster.gpu_memory_gib:g}" if host else ""
    lines = [f"  a learner at the start: {start / GIB:.1f}{of}, for it loads the whole policy before ZeRO-3 shares it"]
    if host:
        lines.append(
            f"  a node's host at the start: {count * host / GIB:.1f}, through which {count} learner{'s' * (count > 1)} "
            f"load{'s' * (count == 1)} {host / GIB:.1f} each"
        )
    return lines


def _row(who: str, memory: Memory, on_gpu: bool, cluster: Cluster) -> str:
    cells = "".join(f"{getattr(memory, name) / GIB:12.1f}" for name in _COLUMNS)
    return f"  {who:16}{cells}" + (f" of {cluster.gpu_memory_gib:g}" if on_gpu else " of the host's")


def _time(config: RunConfig, estimate: RunEstimate, cluster: Cluster) -> list[str]:
    time = estimate.time
    if time is None:
        return [f"time of a step: not estimated, {estimate.no_time}"]
    lines = [f"time of a step, Simulated: {_seconds(time.step_s)}"]
    for name, seconds in (("generate", time.generate_s), ("learn", time.learn_s), ("sync", time.sync_s)):
        lines.append(f"  {name:9}{_seconds(seconds):>10}{seconds / time.step_s:6.0%}")
    if time.validate_s:
        every = config.validation.every
        when = f"every {every} steps" if every else "at the start and at the end"
        lines.append(f"  validate {_seconds(time.validate_s):>10}   {when}, beside the next step")
    hours = config.steps * time.step_s / 3600
    lines.append(
        f"  {time.generated_tokens:,.0f} tokens are generated a step ({time.generated_tokens / time.step_s:,.0f}/s), "
        f"an episode has {time.sequence_tokens:,.0f}; {config.steps} steps take {hours:,.1f} hours"
    )
    if config.rollout.max_staleness:
        lines.append(f"  generate is what is left beside the rest: episodes are played up to {_ahead(config)} ahead")
    return lines + _assumptions(config, estimate, cluster, time)


def _ahead(config: RunConfig) -> str:
    count = config.rollout.max_staleness
    return f"{count} step{'s' * (count > 1)}"


def _assumptions(config: RunConfig, estimate: RunEstimate, cluster: Cluster, time: TimeSplit) -> list[str]:
    load, gpu = estimate.workload, cluster.gpu
    turns = load.turns or max(env.max_turns or config.rollout.max_turns for env in config.envs)
    most = max(env.max_tokens_per_turn or config.rollout.max_tokens_per_turn for env in config.envs)
    lines = [
        f"  assumed: prompts of {load.prompt_tokens} tokens, {turns} turn{'s' * (turns > 1)} of "
        f"{load.tokens_per_turn or max(1, most // 2)} tokens (log-normal, sigma {load.sigma:g}, at most {most})",
    ]
    if turns > 1:
        lines.append(f"  assumed: observations of {load.observation_tokens} tokens after {load.env_s:g} s")
    if config.rollout.dynamic_sampling:
        lines.append("  assumed: every group has a spread of rewards, so that none is replaced")
    if config.policy.gpus_per_replica or config.learner.gpus_per_learner:
        lines.append(
            f"  assumed of a {gpu.name}: {gpu.flops / 1e12:g} TFLOP/s ({gpu.training_share:.0%} by a learner), "
            f"{gpu.bytes_per_s / 1e12:g} TB/s ({gpu.bandwidth_share:.0%} by an engine); weights are sent at "
            f"{cluster.sync_gib_per_s:g} GiB/s"
        )
    else:
        lines.append(f"  assumed of CPU cores: those of this machine, each 128 GFLOP/s; weights are sent at "
                     f"{cluster.sync_gib_per_s:g} GiB/s")  # fmt: skip
    if time.engines < config.policy.replicas:
        lines.append(
            f"  told from {time.engines} of {config.policy.replicas} engines, with their share of the episodes"
        )
    if time.preemptions >= 1:
        lines.append(f"  {time.preemptions:,.0f} requests a step are preempted for want of KV cache")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.1f} s"
