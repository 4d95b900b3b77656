"""The section `alarms` of the run config: what is watched while a policy learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raygym.config_section import PositiveFloat, PositiveInt, Section

AlarmAction = Literal["off", "warn", "stop"]
_MoreThanOne = Annotated[float, Field(gt=1)]
_Share = Annotated[float, Field(gt=0, lt=1)]


class AlarmsConfig(Section):
    """What each alarm does: nothing, one line with the step's trajectories kept, or that and the end of the run.

    A loss, a gradient's norm or an advantage that is not finite always stops the run: no key here allows it.
    """

    entropy_collapse: AlarmAction = "warn"
    """Entropy below `entropy_share` of its mean over the first `patience` steps, `patience` steps in a row."""
    logprob_drift: AlarmAction = "warn"
    """Learner and engine disagree about the sampled tokens: `policy/logprob_abs_diff` above `logprob_limit`, `patience`
    steps in a row; on a step with stale tokens, it must besides be three times the median of the `window` before."""
    gradient_spike: AlarmAction = "warn"
    """A gradient's norm, before clipping, above `gradient_times` the median of the last `window` steps."""
    reward_collapse: AlarmAction = "warn"
    """The reward fell from that of the best `window` by `reward_drop` of the deviation among a step's episodes, and by
    more than steps differ by chance (three deviations), `patience` steps in a row."""
    patience: PositiveInt = 3
    window: Annotated[int, Field(ge=2)] = 10
    """Steps; what compares with the steps before waits until there are so many."""
    entropy_share: _Share = 0.1
    logprob_limit: PositiveFloat | None = None
    """Nats, the mean over tokens; by default 0.01, with `learner.dtype: bfloat16` 0.1."""
    gradient_times: _MoreThanOne = 10.0
    reward_drop: PositiveFloat = 0.5
