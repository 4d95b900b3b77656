"""The run config: one strict pydantic schema. `config_file.py` reads and writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raygym.alarm_config import AlarmsConfig
from raygym.config_section import (
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from raygym.in_flight import OnUpdate
from raygym.learner_config import LearnerConfig
from raygym.logging_config import LoggingConfig
from raygym.nemo_gym.config import ENV_ID as NEMO_GYM
from raygym.nemo_gym.config import NemoGymConfig
from raygym.supervision_config import SupervisionConfig
from raygym.types import FailureKind

__all__ = [
    "AlarmsConfig", "CheckpointConfig", "ConfigError", "DeltaConfig", "EnvConfig", "HttpConfig", "LearnerConfig",
    "LoggingConfig", "NemoGymConfig", "PolicyConfig", "RolloutConfig", "RunConfig", "Section", "SessionsConfig",
    "SupervisionConfig", "SyncConfig", "ValidationConfig",
]  # fmt: skip

# Engine arguments without which tokens, logprobs or weight updates would not be exact.
_VLLM_OWNED = {
    "model": "policy.model",
    "logprobs_mode": "nothing: logprobs are always those after temperature",
    "generation_config": "nothing: the served model's own sampling defaults never leak in",
    "worker_extension_cls": "nothing: raygym's worker extension applies the weights",
}


class HttpConfig(Section):
    """Where the OpenAI-compatible API listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes a free port, which the console prints."""
    max_body_mib: PositiveInt = 32
    """Larger request bodies are refused with status 413."""


class SessionsConfig(Section):
    """Recorded HTTP sessions, for each replica."""

    ttl_s: PositiveFloat = 3600
    """Seconds without a call after which a session and its record are dropped."""
    max_sessions: PositiveInt = 10_000
    max_mib: PositiveInt = 1024
    """Memory of all recorded tokens; beyond it, calls in sessions are refused with status 429."""


class PolicyConfig(Section):
    """The language model being trained, and the engines that serve it."""

    model: str
    """A local directory, a Hugging Face id, `smollm2-135m-instruct`, or `tiny` / `tiny-tied` for tests."""
    engine: Literal["vllm", "simulated"] = "vllm"
    replicas: PositiveInt = 1
    gpus_per_replica: NonNegativeFloat = 0
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed through to vLLM's AsyncEngineArgs."""
    simulated: dict[str, Any] = Field(default_factory=dict)
    """Passed through to the simulated engine."""
    http: HttpConfig = HttpConfig()
    sessions: SessionsConfig = SessionsConfig()
    api_key_env: str = ""
    """Name of the environment variable with the key that HTTP clients must send; empty: no key is asked for."""
    strict_sampling: bool = False
    """Refuse HTTP calls whose sampling differs from the run's, with status 400."""
    tool_parser: str = "auto"
    """vLLM's name of the parser that finds tool calls in chat answers; `auto` tells it from the chat template."""
    startup_timeout_s: PositiveFloat = 600

    @model_validator(mode="after")
    def _engine_owned(self) -> PolicyConfig:
        for key, instead in _VLLM_OWNED.items():
            if key in self.vllm:
                raise ValueError(f"vllm.{key} is set by raygym; use {instead}")
        return self


class EnvConfig(Section):
    """One environment of the mixture."""

    id: str
    """A registered Gymnasium id (`raygym/NumberGuess-v0`), `module:Class`, or `nemo_gym`."""
    name: str = ""
    """How metrics and tasks call it; the id when empty."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    nemo_gym: NemoGymConfig | None = None
    """Servers of NeMo Gym as an environment; goes with the id `nemo_gym`."""
    weight: PositiveFloat = 1.0
    max_turns: PositiveInt | None = None
    """In place of `rollout.max_turns`, as are the next two of theirs."""
    max_tokens_per_turn: PositiveInt | None = None
    step_timeout_s: PositiveFloat | None = None
    isolation: Literal["shared", "actor"] = "shared"
    """`shared`: in the EnvRunner's process, a thread each. `actor`: each instance in a process of its own."""
    processes: NonNegativeInt = 0
    """With `isolation: actor`, how many of them an EnvRunner has at most; 0: two for each core."""
    memory_mib: NonNegativeInt = 0
    """With `isolation: actor`, what an instance may allocate; 0: no limit."""

    @model_validator(mode="after")
    def _isolated(self) -> EnvConfig:
        if self.isolation == "shared" and (self.memory_mib or self.processes):
            raise ValueError("memory_mib and processes need isolation: actor; a shared process cannot tell them apart")
        return self

    @model_validator(mode="after")
    def _nemo_gym_id(self) -> EnvConfig:
        if (self.id == NEMO_GYM) != (self.nemo_gym is not None):
            raise ValueError(f"nemo_gym: a section nemo_gym goes with id: nemo_gym, found id {self.id!r}")
        if self.nemo_gym is not None and self.kwargs:
            raise ValueError("kwargs: has no meaning for id nemo_gym; use nemo_gym.overrides")
        if self.nemo_gym is not None and self.isolation == "actor":
            raise ValueError("isolation: actor has no meaning for id nemo_gym, whose servers are processes already")
        return self

    @property
    def label(self) -> str:
        """`name`, or the id where no name was given."""
        return self.name or self.id


class RolloutConfig(Section):
    """How episodes are collected."""

    groups_per_step: PositiveInt = 8
    group_size: Annotated[int, Field(ge=2)] = 8
    max_turns: PositiveInt = 4
    max_tokens_per_turn: PositiveInt = 16
    max_concurrent: PositiveInt = 64
    """Episodes at once; with `concurrency: adaptive` the most."""
    concurrency: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive`: as many as the engines take without a queue and without preemptions."""
    min_concurrent: PositiveInt = 8
    """With it, the least, at which it begins."""
    max_staleness: NonNegativeInt = 0
    temperature: PositiveFloat = 1.0
    env_runners: PositiveInt = 1
    env_runner_memory_mib: NonNegativeInt = 0
    """What the environments in one EnvRunner's process may allocate together; 0: half of its machine's memory."""
    turn_timeout_s: PositiveFloat = 120
    """Deadline of one generation."""
    step_timeout_s: PositiveFloat = 30
    """Deadline of one `env.reset` or `env.step`."""
    episode_timeout_s: PositiveFloat = 600
    max_retries: NonNegativeInt = 3
    """Fresh attempts at one failed episode before its group is replaced."""
    retries: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """The same for single kinds of failure, such as `{context_overflow: 0}`."""
    max_failures_in_a_row: PositiveInt | None = None
    """Failed attempts of one environment, no episode of it finished in between, before the run stops. By default 256,
    or 4 x `max_concurrent` where that is more: a process that dies fails all that it plays at once."""
    max_replaced_groups: NonNegativeInt = 16
    """Groups replaced in a row, without one delivered, before the run stops with the last cause."""
    order: Literal["task", "completion"] = "task"
    """Which groups a step takes: those of its tasks, in order, or those that are whole first."""
    over_sampling: Annotated[float, Field(ge=0, le=4)] = 0.0
    """With `order: completion`: so many more groups are in play than a step takes, as a share of them. What is not
    whole in time for its staleness is dropped, which favours short episodes."""
    extra_episodes: NonNegativeInt = 0
    """Started for each group beyond `group_size`; the first to finish are the group, which favours short ones."""
    group_deadline_s: PositiveFloat | None = None
    """A group that is not whole so long after its first episode started is replaced by another task's."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal: GRPO learns nothing from them."""
    max_uniform_groups: PositiveInt = 64
    """So many of them in a row stop the run."""

    @model_validator(mode="after")
    def _concurrency_bounds(self) -> RolloutConfig:
        if self.concurrency == "adaptive" and self.min_concurrent > self.max_concurrent:
            raise ValueError(
                f"min_concurrent: {self.min_concurrent} is above rollout.max_concurrent {self.max_concurrent}; with "
                "concurrency: adaptive, expected at most that"
            )
        return self


class DeltaConfig(Section):
    """What of new weights is sent with `sync.mode: delta`."""

    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weights that changed by at most this much, absolute, stay as the engines have them; also after many versions none
    is off by more. 0: whatever changed is sent, to the bit."""
    full_every: PositiveInt = 16
    """Each so-manieth version is sent whole."""


class SyncConfig(Section):
    """How new weights reach the engines."""

    timeout_s: PositiveFloat = 60
    """Of a version's way to the nodes, and again from there into the engines. Who is late is fenced."""
    lease_s: PositiveFloat = 15
    """A replica that the driver has not heard for so long takes no turns until it is sure to have current weights."""
    bucket_mib: PositiveInt = 128
    """Of weights that travel in one piece; the next one is gathered meanwhile."""
    mode: Literal["full", "delta"] = "full"
    """`full`: all weights of each version. `delta`: those that changed, as positions and values, where that is shorter.
    It pays where few change: in 16 bits a small learning rate leaves most as they are, in float32 hardly any."""
    delta: DeltaConfig | None = None
    """Goes with `mode: delta`."""
    on_update: OnUpdate = "keep"
    """Turns that run when new weights come: `keep`, they go on with the new ones; `finish_turn`, they are waited for;
    `restart_turn`, they begin again with the new ones."""
    lora: Literal["merged"] = "merged"
    """What is sent of a policy with `learner.lora`: its weights with the adapters in them, so engines know of none."""
    finish_timeout_s: PositiveFloat = 30
    """With `finish_turn`, how long a turn is waited for; what then still runs is kept. A part of `timeout_s`."""

    @model_validator(mode="after")
    def _delta_has_its_mode(self) -> SyncConfig:
        if self.mode == "full" and self.delta is not None:
            raise ValueError("delta: has no meaning with sync.mode: full; expected mode: delta, or no section delta")
        if self.mode == "delta" and self.delta is None:
            object.__setattr__(self, "delta", DeltaConfig())  # frozen, but not yet anybody's
        return self

    @model_validator(mode="after")
    def _finishes_in_time(self) -> SyncConfig:
        if self.on_update == "finish_turn" and self.finish_timeout_s >= self.timeout_s:
            raise ValueError(
                f"finish_timeout_s: {self.finish_timeout_s:g} s leave no time for the weights themselves; expected "
                f"less than sync.timeout_s ({self.timeout_s:g})"
            )
        return self


class ValidationConfig(Section):
    """Held-out tasks, the same ones at every validation, sampled greedily unless told."""

    tasks: NonNegativeInt = 0
    """0 switches validation off."""
    every: NonNegativeInt = 0
    """Steps between validations; the start and the end are always validated. 0: only those two."""
    temperature: NonNegativeFloat = 0.0
    deadline_s: PositiveFloat = 3600
    """It is played beside the next step, whose weights are published after it; what is late then counts as failed."""


class CheckpointConfig(Section):
    """When the run is saved, so that it can go on from there, and what is kept."""

    every: NonNegativeInt = 20
    """Steps between checkpoints. 0: only at the end."""
    save_final: bool = True
    """Also at the end, whatever `every` is."""
    keep_last: PositiveInt = 2
    """So many of the newest stay."""
    keep_best: NonNegativeInt = 1
    """So many of the best stay, too."""
    best_metric: str = "val/reward"
    """A key of metrics.jsonl, the higher the better. Only checkpoints of steps that have it can be the best."""
    mirror: str | None = None
    """A folder or URL, such as s3://bucket/prefix, to which checkpoints are copied and from which they are taken."""
    mirror_required: bool = False
    """A checkpoint that cannot be copied ends the run; without it, that is told and the next one is tried."""
    mirror_wait_s: NonNegativeFloat = 600
    """How long the run's end waits for what is still being copied."""


class RunConfig(Section):
    """One run."""

    name: str
    seed: NonNegativeInt = 0
    steps: NonNegativeInt
    runs_dir: str = "runs"
    policy: PolicyConfig
    envs: Annotated[list[EnvConfig], Field(min_length=1)]
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @property
    def run_dir(self) -> Path:
        """`<runs_dir>/<name>`."""
        return Path(self.runs_dir) / self.name

    @model_validator(mode="after")
    def _method_is_resolved(self) -> RunConfig:
        learner = self.learner.resolved(stale=self.rollout.max_staleness > 0, most_generated=self.most_generated)
        object.__setattr__(self, "learner", learner)  # frozen, but not yet anybody's
        return self

    @property
    def most_generated(self) -> int:
        """Tokens that an episode can generate, in the environment that allows most."""
        return max(
            (env.max_turns or self.rollout.max_turns) * (env.max_tokens_per_turn or self.rollout.max_tokens_per_turn)
            for env in self.envs
        )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        rollout, learner = self.rollout, self.learner
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable():
            raise ValueError(
                f"name: {self.name!r} must be usable as a folder's name (not empty, no '/', no control characters)"
            )
        episodes = rollout.groups_per_step * rollout.group_size
        if episodes % learner.num_learners:
            raise ValueError(
                f"learner.num_learners: {learner.num_learners} does not divide the batch of "
                f"{episodes} episodes (rollout.groups_per_step {rollout.groups_per_step} x "
                f"rollout.group_size {rollout.group_size}); expected a divisor of {episodes}"
            )
        if rollout.groups_per_step % learner.mini_batches:
            raise ValueError(
                f"learner.mini_batches: {learner.mini_batches} does not divide rollout.groups_per_step "
                f"{rollout.groups_per_step}; expected a divisor of it"
            )
        updates = self.steps * learner.mini_batches
        if learner.lr_schedule != "constant" and self.steps and learner.warmup_steps >= updates:
            raise ValueError(
                f"learner.warmup_steps: {learner.warmup_steps} leaves nothing of the run's {updates} updates (steps x "
                f"learner.mini_batches) to learner.lr_schedule: {learner.lr_schedule}; expected less than {updates}"
            )
        if rollout.over_sampling and rollout.order == "task":
            raise ValueError("rollout.over_sampling: needs rollout.order: completion, since it drops the slowest tasks")
        if self.sync.on_update == "finish_turn" and self.sync.finish_timeout_s >= rollout.turn_timeout_s:
            raise ValueError(
                f"sync.finish_timeout_s: turns that wait so long ({self.sync.finish_timeout_s:g} s) miss their own "
                f"deadline; expected less than rollout.turn_timeout_s ({rollout.turn_timeout_s:g})"
            )
        if unknown := sorted(set(rollout.retries) - set(FailureKind)):
            raise ValueError(
                f"rollout.retries: {unknown[0]!r} is no kind of failure; expected {', '.join(FailureKind)}"
            )
        labels = [env.label for env in self.envs]
        if len(set(labels)) != len(labels):
            raise ValueError(f"envs: two environments are called the same; give each its own name (have {labels})")
        return self
