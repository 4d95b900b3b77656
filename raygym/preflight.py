"""What can be known to be wrong with a run before anything is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from raygym.config import ConfigError, RunConfig
from raygym.deepspeed_options import unknown_option
from raygym.engine_options import check_engine_options
from raygym.env import EnvError, make_env
from raygym.models import ModelError, resolve_policy
from raygym.nemo_gym.config import NemoGymConfig, NemoGymError
from raygym.nemo_gym.play import prepare
from raygym.nemo_gym.resolve import Policy


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs that exist."""

    model_dir: str


def check_inputs(config: RunConfig) -> Prepared:
    """Find the policy's files and make each environment once.

    Raises:
        ConfigError: what is missing, and the key that names it.
    """
    if os.getcwd() not in sys.path:
        # `module:Class` environments of the user's live where the command is run.
        sys.path.insert(0, os.getcwd())
    check_engine_options(config.policy)
    if problem := unknown_option(config.learner.deepspeed):
        raise ConfigError(f"learner.{problem}")
    for index, env in enumerate(config.envs):
        try:
            if env.nemo_gym is not None:
                _check_nemo_gym(env.nemo_gym, config)
            else:
                make_env(env.id, env.kwargs)
        except NemoGymError as error:
            raise ConfigError(f"envs.{index}.nemo_gym.{error}") from error
        except EnvError as error:
            raise ConfigError(f"envs.{index}: {error}") from error
    try:
        return Prepared(str(resolve_policy(config.policy.model)))
    except ModelError as error:
        raise ConfigError(str(error)) from error


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
