"""What can be known to be wrong with a run before anything is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from raygym.config import ConfigError, RunConfig
from raygym.engine_options import check_engine_options
from raygym.env import EnvError, make_env
from raygym.models import ModelError, resolve_policy


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
    for index, env in enumerate(config.envs):
        try:
            make_env(env.id, env.kwargs)
        except EnvError as error:
            raise ConfigError(f"envs.{index}: {error}") from error
    try:
        return Prepared(str(resolve_policy(config.policy.model)))
    except ModelError as error:
        raise ConfigError(str(error)) from error
