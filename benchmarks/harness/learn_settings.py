"""What both learners are told, in raygym's words. Imported by raygym's Python and by TRL's: standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LearnSettings:
    """One comparison's settings. What has a name in `raygym.learner_config` means what it means there."""

    model_dir: str
    rollouts: str
    """Path of the file; see `harness.learn_rollouts`."""
    threads: int
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    temperature: float = 1.0
    advantage: str = "grpo"
    loss: str = "clip"
    loss_mean: str = "token"
    loss_length: int | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    trl_rows: int = 8
    """TRL's per_device_train_batch_size: sequences of one of its micro-batches."""
    trl_checkpointing: bool = False
    """TRL's gradient_checkpointing."""
    learner: dict[str, Any] = field(default_factory=dict)
    """More keys of raygym's config section, which TRL has no counterpart of."""

    def as_json(self) -> str:
        """For the command line of a learner's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LearnSettings:
        """What `as_json` made."""
        values = json.loads(text)
        return cls(**{**values, "betas": tuple(values["betas"])})
