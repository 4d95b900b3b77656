"""The run config: one strict pydantic schema, YAML files, dotted overrides.

`load_config` is the only door: what it returns is valid, what it refuses is a `ConfigError` whose text names
the key, the value found and the value expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raygym.in_flight import OnUpdate
from raygym.nemo_gym.config import ENV_ID as NEMO_GYM
from raygym.nemo_gym.config import NemoGymConfig
from raygym.types import FailureKind

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

# DeepSpeed keys that raygym computes itself, from the batch and the rank count.
_DEEPSPEED_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
# Names of `raygym.algorithms`, whose docstrings say what each is.
LossName = Literal["clip", "gspo", "cispo", "reinforce"]
LossMean = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
# Engine arguments without which tokens, logprobs or weight updates would not be exact.
_VLLM_OWNED = {
    "model": "policy.model",
    "logprobs_mode": "nothing: logprobs are always those after temperature",
    "generation_config": "nothing: the served model's own sampling defaults never leak in",
    "worker_extension_cls": "nothing: raygym's worker extension applies the weights",
}


class ConfigError(ValueError):
    """A config that cannot run. The text is one message for a person: key, what was found, what is expected."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are not coerced from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    vllm: dict[str, Any] = {}
    """Passed through to vLLM's AsyncEngineArgs."""
    simulated: dict[str, Any] = {}
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
    kwargs: dict[str, Any] = {}
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
    retries: dict[str, NonNegativeInt] = {}
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
    threads: NonNegativeInt = 0
    """CPU threads of one learner; 0 shares the cores among the learners."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    deepspeed: dict[str, Any] = {}
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


class SyncConfig(Section):
    """How new weights reach the engines."""

    timeout_s: PositiveFloat = 60
    bucket_mib: PositiveInt = 128
    on_update: OnUpdate = "keep"
    """Turns that run when new weights come: `keep`, they go on with the new ones; `finish_turn`, they are waited for;
    `restart_turn`, they begin again with the new ones."""
    finish_timeout_s: PositiveFloat = 30
    """With `finish_turn`, how long a turn is waited for; what then still runs is kept. A part of `timeout_s`."""

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
    """What is saved of the policy."""

    save_final: bool = True
    """Write the final policy as a Hugging Face directory under `checkpoints/`."""


class LoggingConfig(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    trajectories: bool = True


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

    @property
    def run_dir(self) -> Path:
        """`<runs_dir>/<name>`."""
        return Path(self.runs_dir) / self.name

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        rollout, learner = self.rollout, self.learner
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"name: {self.name!r} must be usable as a folder's name (not empty, no '/')")
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one YAML run config and apply `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing or not a YAML mapping, or a key or value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML run config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; expected a YAML run config") from error
    try:
        data = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (name, steps, policy, envs, ...)")
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate an already parsed mapping. Raises ConfigError naming every wrong key."""
    try:
        # Through JSON mode: YAML has no tuples, and strict Python mode would refuse a list for `betas`.
        return RunConfig.model_validate(_tuples(data))
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, every default written out; `load_config` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 (no dot) as text; YAML 1.2 and everybody who types it mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    learner = data.get("learner")
    if isinstance(learner, dict) and isinstance(learner.get("betas"), list):
        return {**data, "learner": {**learner, "betas": tuple(learner["betas"])}}
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value, such as learner.lr=1e-6")
    try:
        value = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    node: Any = data
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, override)
        if node is None:
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
    if isinstance(node, list):
        node[_index(node, leaf, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    return None


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"override {override!r}: {part!r} is not an index into a list of {len(items)} entries")
    return int(part)


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(item['loc'])}"
    if kind == "missing":
        return f"{key}: is required and missing"
    if kind == "value_error":
        return f"{key}.{message}" if key else message
    found = repr(item["input"])
    return f"{key}: {message[0].lower() + message[1:]}, found {found if len(found) < 80 else found[:77] + '...'}"


def _suggestion(loc: tuple[Any, ...]) -> str:
    model: Any = RunConfig
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        # A list of sections, or a section that may be left out.
        model = next((a for a in get_args(annotation) if hasattr(a, "model_fields")), annotation)
    known = ", ".join(model.model_fields)
    return f"; expected one of: {known}"
