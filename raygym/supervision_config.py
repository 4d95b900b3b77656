"""The section `supervision` of the run config: how often what is lost is started again before the run ends."""

from __future__ import annotations

from raygym.config_section import NonNegativeInt, PositiveFloat, Section


class SupervisionConfig(Section):
    """So many losses of a kind within `window_s` are made good. One more ends the run with its cause, exit code 1.

    A kind whose budget is `null` is started again however often it is lost.
    """

    window_s: PositiveFloat = 3600
    learner_restarts: NonNegativeInt | None = 3
    """The gang is started again as a whole, and the run goes on from its newest checkpoint."""
    manager_restarts: NonNegativeInt | None = 3
    """In a row: a collected step or validation makes the count 0 again."""
    replica_restarts: NonNegativeInt | None = 20
    env_runner_restarts: NonNegativeInt | None = None
    """What an environment's failures may cost is bounded by `rollout.max_failures_in_a_row` besides."""
    weight_store_restarts: NonNegativeInt | None = 20
