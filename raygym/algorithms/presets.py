"""Published methods as settings: what `learner.algorithm` puts in place of defaults, with the papers' values.

A key that the user sets wins. What a paper leaves open, or ties to its own model or data (such as a learning rate or a
KL coefficient), is not here. What belongs to the rollouts is not either: DAPO's `rollout.dynamic_sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The defaults themselves: the group's deviation, the clipped loss, the mean over tokens, no KL.
        "grpo": {},
        # arXiv 2503.20783, section 3.2.
        "dr_grpo": {"advantage": "dr_grpo", "loss_mean": "constant"},
        # arXiv 2503.14476: clip-higher (3.1), the mean over tokens (3.3), overlong shaping over the last fifth of the
        # length, 4,096 of 20,480 tokens, down to -1 (3.4).
        "dapo": {"clip_low": 0.2, "clip_high": 0.28, "loss_mean": "token", "overlong": "shaped"},
        # arXiv 2402.14740, section 2: REINFORCE on whole sequences, the KL in the reward as log p / q. A sum over a
        # sequence's tokens is the mean by a constant length, but for the constant.
        "rloo": {
            "advantage": "rloo",
            "loss": "reinforce",
            "loss_mean": "constant",
            "kl_in": "reward",
            "kl_estimator": "k1",
        },
        # arXiv 2501.03262: log p / q of each token off the reward, all normalised over the step.
        "reinforce_pp": {"advantage": "reinforce_pp", "kl_in": "reward", "kl_estimator": "k1"},
        # The same paper, for several samples of a prompt: the KL is in the loss, as k2.
        "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "kl_in": "loss", "kl_estimator": "k2"},
        # arXiv 2507.18071, section 5.1.
        "gspo": {"loss": "gspo", "loss_mean": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        # arXiv 2506.13585, equations 4 and 5: no lower bound. It tells no upper one: a ratio of at most 5 is ScaleRL's
        # (arXiv 2510.13786).
        "cispo": {"loss": "cispo", "loss_mean": "token", "clip_low": 1.0, "clip_high": 4.0},
        # arXiv 2601.05242.
        "gdpo": {"advantage": "gdpo"},
    }
)

CORRECTION_BOUNDS: Mapping[str, tuple[float | None, float | None]] = MappingProxyType(
    {
        "none": (None, None),
        "auto": (None, None),
        # Cap 2: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
        "truncated_token": (2.0, None),
        "truncated_sequence": (2.0, None),
        # The Ring-1T report, arXiv 2510.18855.
        "masked": (5.0, 0.5),
        # Bounds on the geometric mean: "When Speed Kills Stability", 2025, part 3.
        "rejected_sequence": (1.001, 1 / 1.001),
    }
)
"""`correction_cap` and `correction_low` where the user sets none; None where a correction has no such bound."""
OVERLONG_BUFFER_SHARE = 0.2
"""DAPO's 4,096 of 20,480 tokens."""
