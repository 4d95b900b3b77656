"""The section `learner` of the run config: the method, of `method_config.py`, and DeepSpeed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raygym.config_section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from raygym.method_config import MethodConfig

# DeepSpeed keys that raygym computes itself, from the batch and the rank count.
_DEEPSPEED_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
PackingName = Literal["auto", "forest", "rows"]


class LearnerConfig(MethodConfig):
    """The method, and DeepSpeed."""

    num_learners: PositiveInt = 1
    gpus_per_learner: NonNegativeFloat = 0
    lr: PositiveFloat = 1e-6
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates over which the learning rate rises linearly to `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: PositiveFloat = 1.0
    mini_batches: PositiveInt = 1
    """Optimizer updates made from one step's groups."""
    tokens_per_micro_batch: PositiveInt = 2048
    packing: PackingName = "auto"
    """`forest`: what sequences begin with in common, such as a group's prompt, is computed once, and nothing is padded;
    the policy's attention must allow it. `rows`: several sequences to a row. `auto`: the first where it is exact."""
    threads: NonNegativeInt = 0
    """CPU threads of one learner; 0 shares the cores among the learners."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    peak_tflops: PositiveFloat | None = None
    """What one learner's device can do in `dtype`, for `learn/mfu`; known of usual GPUs in bfloat16."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed through to DeepSpeed; `zero_optimization: {stage: 0..3}` chooses the ZeRO stage."""
    startup_timeout_s: PositiveFloat = 600
    update_timeout_s: PositiveFloat = 3600

    @model_validator(mode="after")
    def _deepspeed_owned(self) -> LearnerConfig:
        for key in _DEEPSPEED_OWNED:
            if key in self.deepspeed:
                raise ValueError(f"deepspeed.{key} is set by raygym from the batch; remove it")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
            raise ValueError("deepspeed.zero_optimization must be a mapping with stage: 0, 1, 2 or 3")
        return self

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))
