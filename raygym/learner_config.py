"""The section `learner` of the run config: the method, of `method_config.py`, and DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raygym.config_section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from raygym.deepspeed_options import check_deepspeed
from raygym.method_config import MethodConfig

PackingName = Literal["auto", "forest", "rows"]
LrSchedule = Literal["constant", "linear", "cosine"]


class LoraConfig(Section):
    """Low-rank adapters, trained in place of the policy's own weights; see `raygym.lora`."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    """What the adapters add is scaled by `alpha` / `rank`."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """`all-linear`: every linear layer but the output head; or the ends of their names, such as `[q_proj, v_proj]`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' inputs, in updates only. Above 0 the ratio to the engine's policy is noisy."""


class LearnerConfig(MethodConfig):
    """The method, and DeepSpeed."""

    num_learners: PositiveInt = 1
    gpus_per_learner: Annotated[float, Field(ge=0, le=1)] = 0
    """0: on CPUs. 1: each rank has a GPU. Less: a single learner shares its GPU with an engine."""
    lr: PositiveFloat = 1e-6
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates over which the learning rate rises linearly to `lr`."""
    lr_schedule: LrSchedule = "constant"
    """What follows: `linear` and `cosine` fall to `lr_min` at the end of the run."""
    lr_min: NonNegativeFloat = 0.0
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
    """CPU threads of one learner. 0: on CPUs the learners share the cores; on GPUs Ray decides, which means one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, activations and what is sent to the engines. The optimizer's own weights are fp32 with both."""
    peak_tflops: PositiveFloat | None = None
    """What one learner's device can do in `dtype`, for `learn/mfu`; known of usual GPUs in bfloat16."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time in the backward pass rather than keep what it computed."""
    lora: LoraConfig | None = None
    """Train adapters; None trains all weights."""
    placement: Literal["pack", "spread"] = "pack"
    """Of the ranks' GPUs: on as few nodes as possible, or on as many."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed through to DeepSpeed; `zero_optimization: {stage: 0..3}` chooses the ZeRO stage."""
    startup_timeout_s: PositiveFloat = 600
    update_timeout_s: PositiveFloat = 3600

    @model_validator(mode="after")
    def _deepspeed_owned(self) -> LearnerConfig:
        check_deepspeed(self.deepspeed)
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_rank(self) -> LearnerConfig:
        if 0 < self.gpus_per_learner < 1 and self.num_learners > 1:
            raise ValueError(
                f"gpus_per_learner: {self.gpus_per_learner:g} could put two of {self.num_learners} learners on one "
                "GPU, which NCCL refuses; expected 1, or num_learners: 1"
            )
        return self

    @model_validator(mode="after")
    def _schedule_falls(self) -> LearnerConfig:
        if self.lr_min and self.lr_schedule == "constant":
            raise ValueError(
                f"lr_min: {self.lr_min:g} is used by lr_schedule: linear or cosine only; found lr_schedule: constant; "
                f"remove one of them"
            )
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min: {self.lr_min:g} is above lr {self.lr:g}; expected at most that")
        return self

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))
