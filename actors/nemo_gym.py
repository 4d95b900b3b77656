"""NeMo Gym's servers of a run: an actor that keeps them running, and its driver side."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygym.config import ConfigError, EnvConfig, RunConfig
from raygym.nemo_gym.config import NemoGymError
from raygym.nemo_gym.play import Environment, prepare
from raygym.nemo_gym.resolve import Policy
from raygym.nemo_gym.resources import ResourcesEnv
from raygym.nemo_gym.servers import ServerSet

_STOP_TIMEOUT_S = 30.0
_START_MARGIN_S = 30.0


class NemoGymServers:
    """Keeps the servers of all NeMo Gym environments running. They end with this actor, also when it is killed."""

    def __init__(self, environments: Sequence[Environment], folder: str) -> None:
        """Start them; returns at once.

        Args:
            environments: each with its own servers.
            folder: for their logs, one folder an environment.
        """
        self._sets = [
            ServerSet(environment, Path(folder) / f"{index}-{environment.servers[0].name}")
            for index, environment in enumerate(environments)
        ]
        for servers in self._sets:
            servers.start()

    def wait_ready(self) -> None:
        """Block until all servers answer. Raises NemoGymError when some cannot be started."""
        for servers in self._sets:
            servers.wait_ready()

    def processes(self) -> dict[str, int]:
        """The process id of each server's guard, whose group is the server's."""
        return {name: pid for servers in self._sets for name, pid in servers.processes().items()}

    def stop(self) -> None:
        """End all servers and wait until they are gone."""
        for servers in self._sets:
            servers.stop()


class NemoGym:
    """The NeMo Gym environments of one run, from the driver. Without any, nothing is started."""

    def __init__(self, config: RunConfig, policy_url: str, log_folder: Path | None = None) -> None:
        """Resolve the configs and begin to start the servers.

        Args:
            config: the run's.
            policy_url: base URL of the policy's OpenAI API, which NeMo Gym's agents call.
            log_folder: for the servers' logs; None: a temporary one.

        Raises:
            ConfigError: what is wrong, and the key.
        """
        self._actor: Any = None
        self._temporary = ExitStack()
        # Without such environments nothing is made, which a kill -9 would leave behind.
        self._folder = self._make_folder() if any(env.nemo_gym for env in config.envs) else ""
        self._environments: list[Environment] = []
        policy = Policy(policy_url, config.policy.model, os.environ.get(config.policy.api_key_env, "") or "-")
        envs = [self._attach(index, env, policy, config) for index, env in enumerate(config.envs)]
        self.config = config.model_copy(update={"envs": envs})
        """The run's config, in which these environments are ones that an EnvRunner can make."""
        if self._environments:
            actor: Any = ray.remote(NemoGymServers)
            logs = str((log_folder or Path(self._folder)).absolute())
            # Restarted by Ray it starts the servers anew and publishes them in the same place.
            options = actor.options(num_cpus=0, max_restarts=-1, max_concurrency=4, **self.placement)
            self._actor = options.remote(self._environments, logs)

    @property
    def placement(self) -> dict[str, Any]:
        """Options for actors that must reach the servers, which listen on the driver's machine alone."""
        if not self._environments:
            return {}
        return {
            "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        }

    def wait_ready(self) -> None:
        """Block until all servers answer.

        Raises:
            RuntimeError: some cannot be started; the text says which and why.
            TimeoutError: the actor does not answer.
        """
        if self._actor is None:
            return
        timeout_s = max(e.section.startup_timeout_s for e in self._environments) + _START_MARGIN_S
        try:
            ray.get(self._actor.wait_ready.remote(), timeout=timeout_s)
        except GetTimeoutError as error:
            raise TimeoutError(f"NeMo Gym's servers were not up within {timeout_s:g} s") from error
        except RayTaskError as error:
            raise RuntimeError(f"NeMo Gym's servers cannot be started: {error.cause}") from None

    def shutdown(self) -> None:
        """End all servers and the actor."""
        if self._actor is not None:
            # Whatever becomes of this, the actor's death, next, ends them as well.
            with suppress(GetTimeoutError, RayActorError, RayTaskError):
                ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S)
            ray.kill(self._actor)
            self._actor = None
        self._temporary.close()

    def _make_folder(self) -> str:
        folder = tempfile.TemporaryDirectory(prefix="raygym-nemo-gym-", ignore_cleanup_errors=True)
        return self._temporary.enter_context(folder)

    def _attach(self, index: int, env: EnvConfig, policy: Policy, config: RunConfig) -> EnvConfig:
        if env.nemo_gym is None:
            return env
        try:
            environment = prepare(env.nemo_gym, policy, env.max_turns or config.rollout.max_turns)
        except NemoGymError as error:
            raise ConfigError(f"envs.{index}.nemo_gym.{error}") from error
        environment = environment.published_at(f"{self._folder}/servers-{index}.json")
        self._environments.append(environment)
        entry_point = f"{ResourcesEnv.__module__}:{ResourcesEnv.__name__}"
        return env.model_copy(update={"id": entry_point, "name": env.label, "kwargs": {"play": environment.play}})
