"""The part of the section `learner` that says what is learned from a step's episodes: the method.

Formulas and papers are in `raygym/algorithms/`; combinations that mean nothing are refused here, with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from raygym.algorithms.presets import CORRECTION_BOUNDS, OVERLONG_BUFFER_SHARE, PRESETS
from raygym.config_section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

AlgorithmName = Literal[
    "grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo", "cispo", "gdpo"
]
AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo"]
LossName = Literal["clip", "gspo", "cispo", "reinforce"]
LossMean = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncated_token", "truncated_sequence", "masked", "rejected_sequence"]

_Method = TypeVar("_Method", bound="MethodConfig")


class MethodConfig(Section):
    """GRPO and its family."""

    algorithm: AlgorithmName = "grpo"
    """A published method: the defaults of the keys below (`raygym/algorithms/presets.py`). Keys that are set win."""
    advantage: AdvantageName = "grpo"
    """How rewards become advantages. `reinforce_pp` normalises over all episodes of a step, the others look at groups;
    `reinforce_pp_baseline` and `gdpo` do both. `gdpo` normalises each component of the reward by itself."""
    reward_weights: dict[str, float] = Field(default_factory=dict)
    """Weights of the reward's components (`info["rewards"]`), 1 for those that are not named."""
    credit: Literal["episode", "turn"] = "episode"
    """What an advantage belongs to: `turn`, each turn's discounted sum of the rewards from it on, compared with the
    same turn of the group's other episodes."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """With `credit: turn`, the discount from one turn to the next."""
    loss: LossName = "clip"
    """`reinforce` has no ratio: alone it is exact on-policy only, with one mini-batch and no staleness."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio's lower bound is 1 - `clip_low`: with 1 there is none."""
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """With `loss: clip`, a second bound on the ratio where the advantage is negative; 3 is usual."""
    loss_mean: LossMean = "token"
    """What counts the same in a mini-batch: each `token`, each `sequence`, or each token whatever else is in the
    mini-batch (`constant`: sequences x `loss_length`)."""
    loss_length: PositiveInt | None = None
    """Tokens, with `loss_mean: constant`; by default the most that an episode can generate."""
    decoupled: bool | Literal["auto"] = "auto"
    """Clip around the learner's own policy before the step (proximal) instead of the engine's (behaviour), and weigh by
    proximal / behaviour. `auto`: where `rollout.max_staleness` is above 0, or a correction is asked for."""
    correction: Correction | Literal["auto"] = "auto"
    """What bounds the weight proximal / behaviour. `auto`: `truncated_token` where the loss is decoupled."""
    correction_cap: PositiveFloat | None = None
    """Upper bound; by default the published one of each correction."""
    correction_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Lower bound of `masked` and `rejected_sequence`."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the starting policy; above 0 a frozen copy is kept."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`reward`: subtracted from rewards before there are advantages."""
    kl_estimator: KlEstimator = "k3"
    """In the loss, `k2` has the KL's own gradient on-policy, `k3` is the one of GRPO, `k1` only measures: its gradient
    is 0 on average. In the reward, `k1` is the usual one."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus: so much times each token's entropy is subtracted from its loss."""
    overlong: Literal["none", "shaped", "filtered"] = "none"
    """Episodes that are too long: `shaped` lowers their reward; `filtered` trains none that was cut short."""
    overlong_length: PositiveInt | None = None
    """Generated tokens of an episode at which `overlong_penalty` is taken off; by default the most it can generate."""
    overlong_buffer: PositiveInt | None = None
    """Tokens before that over which the penalty grows from 0; by default a fifth of the length."""
    overlong_penalty: PositiveFloat = 1.0

    @model_validator(mode="wrap")
    @classmethod
    def _with_preset(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        name = data.get("algorithm", "grpo") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return handler(data)
        return _with_fields_set(handler({**PRESETS[name], **data}), set(data))

    @model_validator(mode="after")
    def _loss_is_whole(self) -> Self:
        if self.dual_clip is not None and self.loss != "clip":
            raise ValueError(f"dual_clip: bounds the ratio of loss: clip; found loss: {self.loss}; remove one of them")
        if self.loss == "gspo" and self.loss_mean != "sequence":
            raise ValueError(
                f"loss_mean: {self.loss_mean} weights a sequence by its length, but loss: gspo has one loss for each; "
                f"expected loss_mean: sequence"
            )
        if self.loss_mean != "constant" and self.loss_length is not None:
            raise ValueError(
                f"loss_length: {self.loss_length} is used by loss_mean: constant only; found loss_mean: "
                f"{self.loss_mean}; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _rewards_are_whole(self) -> Self:
        if self.gamma != 1 and self.credit == "episode":
            raise ValueError(f"gamma: {self.gamma:g} discounts from turn to turn; expected credit: turn with it")
        if self.credit == "turn" and self.reward_weights:
            raise ValueError("reward_weights: are of whole episodes; expected credit: episode with them")
        if self.advantage == "gdpo":
            for key, value in (("credit", "turn"), ("kl_in", "reward"), ("overlong", "shaped")):
                if getattr(self, key) == value and (key != "kl_in" or self.kl_coef):
                    raise ValueError(
                        f"{key}: {value} changes the reward as a whole, but advantage: gdpo has none, only components; "
                        f"expected another {key} or another advantage"
                    )
        return self

    @model_validator(mode="after")
    def _correction_is_whole(self) -> Self:
        bounds = CORRECTION_BOUNDS[self.correction]
        for key, published in zip(("correction_cap", "correction_low"), bounds, strict=True):
            if published is None and getattr(self, key) is not None and self.correction != "auto":
                raise ValueError(f"{key}: correction: {self.correction} has no such bound; remove it")
        if (
            self.decoupled is False
            and self.correction not in ("none", "auto", "rejected_sequence")
            and self.loss != "reinforce"
        ):
            raise ValueError(
                f"correction: {self.correction} weighs by proximal / behaviour, which with decoupled: false is in the "
                f"ratio of loss: {self.loss} already; expected decoupled: true or auto"
            )
        return self

    @model_validator(mode="after")
    def _overlong_is_whole(self) -> Self:
        for key in ("overlong_length", "overlong_buffer"):
            if getattr(self, key) is not None and self.overlong != "shaped":
                raise ValueError(f"{key}: is used by overlong: shaped only; found overlong: {self.overlong}")
        return self

    def resolved(self, *, stale: bool = False, most_generated: int | None = None) -> Self:
        """The same with what `auto` and missing values mean; of one that is resolved, itself.

        `model_fields_set` has what the user chose, also afterwards: neither what a preset sets, nor what is found here.

        Args:
            stale: older versions' tokens are trained (`rollout.max_staleness` above 0).
            most_generated: tokens that an episode can generate; None: not known, so lengths stay as they are.

        Raises:
            ValueError: values that do not fit together once they are known.
        """
        explicit = self.correction not in ("none", "auto")
        decoupled = self.decoupled if self.decoupled != "auto" else stale or explicit
        correction = self.correction if self.correction != "auto" else "truncated_token" if decoupled else "none"
        cap, low = CORRECTION_BOUNDS[correction]
        found: dict[str, Any] = {
            "decoupled": decoupled,
            "correction": correction,
            "correction_cap": cap if self.correction_cap is None else self.correction_cap,
            "correction_low": low if self.correction_low is None else self.correction_low,
        }
        if self.loss_mean == "constant" and self.loss_length is None:
            found["loss_length"] = most_generated
        if self.overlong == "shaped":
            length = self.overlong_length or most_generated
            found["overlong_length"] = length
            if self.overlong_buffer is None and length is not None:
                found["overlong_buffer"] = max(1, round(OVERLONG_BUFFER_SHARE * length))
            elif self.overlong_buffer is not None and length is not None and self.overlong_buffer > length:
                raise ValueError(
                    f"learner.overlong_buffer: {self.overlong_buffer} is above learner.overlong_length ({length}); "
                    "expected at most that"
                )
        if cap is not None and low is not None and found["correction_low"] >= found["correction_cap"]:
            raise ValueError(
                f"learner.correction_low: {found['correction_low']:g} is not below learner.correction_cap "
                f"({found['correction_cap']:g})"
            )
        chosen = {key for key in self.model_fields_set if found.get(key, getattr(self, key)) == getattr(self, key)}
        return _with_fields_set(self.model_copy(update=found), chosen)

    @property
    def weighs_tokens(self) -> bool:
        """Whether losses are weighed by proximal / behaviour. Of a resolved method."""
        assert self.correction != "auto" and self.decoupled != "auto", "resolved() comes first"
        return self.decoupled or self.correction != "none"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards need the starting policy's logprobs."""
        return self.kl_coef > 0 and self.kl_in == "reward"


def _with_fields_set(method: _Method, keys: set[str]) -> _Method:
    object.__setattr__(method, "__pydantic_fields_set__", keys)  # frozen, but not yet anybody's
    return method
