"""Everything that crosses an actor boundary: frozen, slotted dataclasses, each with its invariants.

Token IDs travel as int32 arrays, log-probabilities as float32, weight versions as int32: Ray ships arrays
without copying them item by item. `T` in a comment is the number of tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]
"""One chat message in OpenAI's form: `{"role": ..., "content": ..., "tool_calls": ...}`."""

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class EpisodeStatus(StrEnum):
    """How an episode ended. Only the first two carry a reward."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"
    FAILED = "failed"


class FailureKind(StrEnum):
    """Why an episode failed. A failure is never a reward; it is retried or its group is replaced."""

    ENV_ERROR = "env_error"
    ENV_TIMEOUT = "env_timeout"
    ENV_LOST = "env_lost"
    ENGINE_ERROR = "engine_error"
    ENGINE_TIMEOUT = "engine_timeout"
    ENGINE_LOST = "engine_lost"
    CONTEXT_OVERFLOW = "context_overflow"
    CANCELLED = "cancelled"
    INVALID_LOGPROBS = "invalid_logprobs"
    MASKED = "masked"
    """The environment says that its reward is no measurement: not in the loss, not in the baseline."""
    FORKED = "forked"
    """An agent rewrote its history, so the tokens are no longer one sequence."""
    MISSING_TOKEN_IDS = "missing_token_ids"


class EpisodeFailure(Exception):
    """Raised inside an episode to end it as `failed(kind)`. Picklable, so that it survives a remote call."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one turn is sampled. Everything the engine uses is here: served defaults never leak in."""

    temperature: float = 1.0
    """0 is greedy."""
    max_tokens: int = 16
    seed: int | None = None
    """Seed of this one generation; None leaves the engine's own generator."""

    def __post_init__(self) -> None:
        assert self.temperature >= 0, self.temperature
        assert self.max_tokens >= 1, self.max_tokens


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine answers to one `generate`: N tokens with the logprob and weight version of each."""

    token_ids: Int32Array
    """N IDs, the stop token included when the engine produced one."""
    logprobs: Float32Array
    """N log-probabilities of the sampled tokens, after temperature."""
    weight_versions: Int32Array
    """N versions: the weights that made each token."""
    finish_reason: str
    """`stop` (a stop token ended it) or `length` (max_tokens or the context ended it)."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs) == len(self.weight_versions)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do at one moment."""

    running: int
    """Requests in its batch."""
    waiting: int
    """Requests that wait to be in it. Not those that a change of weights has frozen and that will soon go on."""
    preemptions: int = 0
    """How often a request had to leave the batch for want of KV cache, since the engine started."""
    kv_cache_usage: float = 0.0
    """Share of the KV cache that requests in the batch hold, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of the order: an environment and a seed. All G episodes of a group share it."""

    index: int
    """Position in the order of the run; unique within (split)."""
    env: str
    """`name` of the environment in the run's `envs`."""
    seed: int
    """Given to `env.reset(seed=...)`; identifies the task within its environment and split."""
    split: str = "train"
    """`train` or `validation`; handed to the environment in `options["split"]`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation and the environment's reply to it, as a range of the trajectory's tokens."""

    start: int
    """Index of the first generated token."""
    end: int
    """One past the last generated token."""
    reward: float
    finish_reason: str
    generate_s: float
    env_s: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode. Its tokens are exactly those that the policy saw and produced.

    Invariants: the four arrays have length T; `loss_mask` is True exactly on generated tokens with finite
    logprobs; outside generated tokens logprobs are 0 and versions -1; `failure` is set iff `status` is failed.
    """

    task: Task
    group_id: str
    episode: int
    """0..G-1 within the group."""
    attempt: int
    """0 for the first try; a retry of a failed episode counts up."""
    status: EpisodeStatus
    token_ids: Int32Array
    loss_mask: BoolArray
    logprobs: Float32Array
    weight_versions: Int32Array
    turns: tuple[Turn, ...]
    reward: float
    """Sum of the turns' rewards. Meaningless (0.0) for a failed episode, which never enters a baseline."""
    messages: tuple[Message, ...]
    sampling: Sampling
    drifted: bool = False
    """Re-rendering the whole history would have given other IDs than those that the policy saw or produced."""
    failure: FailureKind | None = None
    failure_detail: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    """The environment's own scalars (`info["metrics"]` of the last step)."""
    reward_components: dict[str, float] = field(default_factory=dict)
    """What the reward consists of, by name, where the environment says so: their sum is `reward`."""
    packed: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """The bytes that it came from, whose memory its arrays share; None where it was made."""

    def __reduce__(self) -> tuple[Callable[[bytes], Trajectory], tuple[bytes]]:
        """Pickled by `raygym.trajectory_bytes`, which needs this module."""
        from raygym.trajectory_bytes import pack, unpack

        return unpack, (pack(self),)

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        assert len(self.loss_mask) == len(self.logprobs) == len(self.weight_versions) == length
        assert (self.failure is not None) == (self.status is EpisodeStatus.FAILED)


@dataclass(frozen=True, slots=True)
class Group:
    """The G episodes of one task: the unit of GRPO's advantage. No failed episode is inside."""

    group_id: str
    task: Task
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        assert all(t.status is not EpisodeStatus.FAILED for t in self.trajectories)
        assert all(t.group_id == self.group_id for t in self.trajectories)

    @property
    def rewards(self) -> list[float]:
        """G rewards, in episode order."""
        return [t.reward for t in self.trajectories]


LearnStats = dict[str, float]
"""What a step's updates amount to, by name; see `PolicyUpdate.run`."""


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """What a learner needs of one trajectory: T tokens, which of them train, and with what advantages."""

    token_ids: Int32Array
    loss_mask: BoolArray
    logprobs: Float32Array
    """Behaviour logprobs, of the engine that sampled."""
    advantages: Float32Array
    """T, 0 outside the mask."""
    group: int = 0
    """Number of its group within the step."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        assert len(self.loss_mask) == len(self.logprobs) == length
        assert np.shape(self.advantages) == (length,), "one advantage a token; TrainSequence.uniform takes a number"
        assert not np.any(self.advantages[~self.loss_mask]), "only trained tokens have an advantage"

    @classmethod
    def uniform(
        cls, token_ids: Int32Array, loss_mask: BoolArray, logprobs: Float32Array, advantage: float, group: int = 0
    ) -> TrainSequence:
        """All trained tokens with the same advantage."""
        advantages = np.where(loss_mask, np.float32(advantage), np.float32(0))
        return cls(token_ids, loss_mask, logprobs, advantages, group)

    @property
    def has_signal(self) -> bool:
        """Some advantage is not 0."""
        return bool(np.any(self.advantages))
