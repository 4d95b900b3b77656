"""How two run configs differ, and whether a run can go on with the other one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What changes where and how fast a result is made, or what is kept of it, but not the result. Everything that a later
# version of the config adds is outside until somebody has thought about it.
_HARMLESS = re.compile(
    r"""
    runs_dir | logging\..* | checkpoint\..* | alarms\..* | supervision\..* | validation\.(every|deadline_s)
    | .*_timeout_s | sync\.(bucket_mib|lease_s)
    | policy\.(replicas|gpus_per_replica|api_key_env|strict_sampling|http\..*|sessions\..*)
    | rollout\.(max_concurrent|min_concurrent|concurrency|env_runners|env_runner_memory_mib|max_retries|retries.*
        |max_failures_in_a_row|max_replaced_groups|max_uniform_groups)
    | envs\.\d+\.(isolation|processes|memory_mib)
    | learner\.(num_learners|gpus_per_learner|threads|peak_tflops|placement|tokens_per_micro_batch|packing
        |gradient_checkpointing|deepspeed.*)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Change:
    """One key with another value than before; None where there is no such key."""

    key: str
    old: Any
    new: Any
    harmless: bool
    """It changes no result beyond the order of floating-point sums."""

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two configs as plain mappings, by dotted key, in the order of the old one."""
    before, now = flat(old), flat(new)
    # A rate that falls until the last step is another one at each step when there are more of them.
    falls = any(config.get("learner.lr_schedule", "constant") != "constant" for config in (before, now))

    def harmless(key: str) -> bool:
        return not falls if key == "steps" else _HARMLESS.fullmatch(key) is not None

    return [
        Change(key, before.get(key), now.get(key), harmless(key))
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists by dotted key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list) or not value:
        return {prefix: value}
    return {key: leaf for name, part in items for key, leaf in flat(part, f"{prefix}.{name}".lstrip(".")).items()}
