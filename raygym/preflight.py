"""What can be known to be wrong with a run before anything is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from raygym.architecture import read_architecture
from raygym.config import ConfigError, RunConfig
from raygym.deepspeed_options import unknown_option
from raygym.engine_options import check_engine_options
from raygym.env import EnvError, make_env
from raygym.mirror_store import MirrorStore
from raygym.models import ModelError, find_policy, resolve_policy
from raygym.nemo_gym.config import NemoGymConfig, NemoGymError, NemoGymMissing
from raygym.nemo_gym.play import prepare
from raygym.nemo_gym.resolve import Policy
from raygym.rope_scaling import check_rope_scaling
from raygym.simulate import SimulatedConfig


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs that exist."""

    model_dir: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What a machine that need not be the run's can tell of its inputs."""

    model_dir: str | None
    """The policy's files; None where they are not here."""
    missing: tuple[str, ...]
    """What is not here, so that nothing can be said of it."""


def check_inputs(config: RunConfig, *, learns: bool = True) -> Prepared:
    """Find the policy's files and make each environment once.

    Args:
        config: the run's.
        learns: the policy is not only asked, so the learner must be able to compute it exactly.

    Raises:
        ConfigError: what is missing, and the key that names it.
    """
    _check_all_but_policy(config)
    try:
        found = str(resolve_policy(config.policy.model))
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if learns:
        _check_architecture(config, found)
    return Prepared(found)


def check_what_is_here(config: RunConfig) -> Checked:
    """As `check_inputs`, but nothing is downloaded, and what is not on this machine is told instead of refused.

    Raises:
        ConfigError: what is wrong, and the key that names it.
    """
    missing: list[str] = []
    _check_all_but_policy(config, missing)
    try:
        found = find_policy(config.policy.model)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if found is None:
        missing.append(f"policy.model: the files of {config.policy.model} are not here; a run downloads them")
    model_dir = str(found) if found is not None else None
    _check_architecture(config, model_dir)
    return Checked(model_dir, tuple(missing))


def _check_architecture(config: RunConfig, model_dir: str | None) -> None:
    """Look at the policy's config.json, where one is known."""
    policy, architecture = config.policy, read_architecture(config.policy.model, model_dir)
    if architecture is None:
        return
    simulated = policy.engine == "simulated"
    longest = SimulatedConfig(**policy.simulated).max_model_len if simulated else policy.vllm.get("max_model_len")
    key = "policy.simulated.max_model_len" if simulated else "policy.vllm.max_model_len"
    check_rope_scaling(architecture.config, longest, key)


def _check_all_but_policy(config: RunConfig, missing: list[str] | None = None) -> None:
    """Of what is not here, `missing` is told; without it, that is an error like others."""
    if os.getcwd() not in sys.path:
        # `module:Class` environments of the user's live where the command is run.
        sys.path.insert(0, os.getcwd())
    check_engine_options(config.policy)
    if problem := unknown_option(config.learner.deepspeed):
        raise ConfigError(f"learner.{problem}")
    if config.checkpoint.mirror is not None:
        MirrorStore.open(config.checkpoint.mirror, config.name)
    for index, env in enumerate(config.envs):
        try:
            if env.nemo_gym is not None:
                _check_nemo_gym(env.nemo_gym, config)
            else:
                make_env(env.id, env.kwargs)
        except NemoGymMissing as error:
            if missing is None:
                raise ConfigError(f"envs.{index}.nemo_gym.{error}") from error
            missing.append(f"envs.{index}.nemo_gym.{error}")
        except NemoGymError as error:
            raise ConfigError(f"envs.{index}.nemo_gym.{error}") from error
        except EnvError as error:
            raise ConfigError(f"envs.{index}: {error}") from error


def _check_nemo_gym(section: NemoGymConfig, config: RunConfig) -> None:
    """Resolve its config and read its datasets, with an address of the policy's that nobody listens on."""
    prepare(section, Policy("http://127.0.0.1:0/v1", config.policy.model), config.rollout.max_turns)
    differs = config.validation.tasks and config.validation.temperature != config.rollout.temperature
    if section.mode == "agent" and config.policy.strict_sampling and differs:
        raise NemoGymError(
            "mode: with policy.strict_sampling, an agent's calls must have rollout.temperature "
            f"{config.rollout.temperature}, also when it validates; set validation.temperature to it, or "
            "validation.tasks to 0"
        )
