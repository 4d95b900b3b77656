"""The section `learner` of the run config: the algorithm, and DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raygym.config_section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from raygym.deepspeed_options import check_deepspeed

# Names of `raygym.algorithms`, whose docstrings say what each is.
LossName = Literal["clip", "gspo", "cispo", "reinforce"]
LossMean = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
PackingName = Literal["auto", "forest", "rows"]
AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
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


class LearnerConfig(Section):
    """GRPO and its family on DeepSpeed."""

    algorithm: Literal["grpo"] = "grpo"
    advantage: AdvantageName = "grpo"
    """How rewards become advantages. `reinforce_pp` normalises over all episodes of a step, the others look at groups;
    `reinforce_pp_baseline` does both."""
    num_learners: PositiveInt = 1
    gpus_per_learner: NonNegativeFloat = 0
    lr: PositiveFloat = 1e-6
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates over which the learning rate rises linearly to `lr`."""
    lr_schedule: LrSchedule = "constant"
    """What follows: `linear` and `cosine` fall to `lr_min` at the end of the run."""
    lr_min: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    loss: LossName = "clip"
    """`reinforce` has no ratio, so it is exact on-policy only: one mini-batch, no staleness."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio's lower bound is 1 - `clip_low`: with 1 there is none."""
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """With `loss: clip`, a second bound on the ratio where the advantage is negative; 3 is usual."""
    loss_mean: LossMean = "token"
    """What counts the same in a mini-batch: each `token`, each `sequence`, or each token whatever else is in the
    mini-batch (`constant`: sequences x `loss_length`)."""
    loss_length: PositiveInt | None = None
    """Tokens, with `loss_mean: constant`: the most that an episode can generate."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the starting policy, in the loss; above 0 a frozen copy is kept."""
    kl_estimator: KlEstimator = "k3"
    """`k2` has the KL's own gradient on-policy, `k3` is the one of GRPO, `k1` only measures: its gradient is 0 on
    average."""
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
    """Of weights, activations and what is sent to the engines. The optimizer's own weights are fp32 with both."""
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
    def _schedule_falls(self) -> LearnerConfig:
        if self.lr_min and self.lr_schedule == "constant":
            raise ValueError(
                f"lr_min: {self.lr_min:g} is used by lr_schedule: linear or cosine only; found lr_schedule: constant; "
                f"remove one of them"
            )
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min: {self.lr_min:g} is above lr {self.lr:g}; expected at most that")
        return self

    @model_validator(mode="after")
    def _loss_is_whole(self) -> LearnerConfig:
        if self.dual_clip is not None and self.loss != "clip":
            raise ValueError(f"dual_clip: bounds the ratio of loss: clip; found loss: {self.loss}; remove one of them")
        if self.loss == "gspo" and self.loss_mean != "sequence":
            raise ValueError(
                f"loss_mean: {self.loss_mean} weights a sequence by its length, but loss: gspo has one loss for each; "
                f"expected loss_mean: sequence"
            )
        if self.loss_mean == "constant" and self.loss_length is None:
            raise ValueError(
                "loss_length: missing; loss_mean: constant divides by it; expected a number of tokens, such as "
                "rollout.max_turns x rollout.max_tokens_per_turn"
            )
        if self.loss_mean != "constant" and self.loss_length is not None:
            raise ValueError(
                f"loss_length: {self.loss_length} is used by loss_mean: constant only; found loss_mean: "
                f"{self.loss_mean}; remove one of them"
            )
        return self

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))
