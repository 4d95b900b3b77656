"""The EnvRunner: hosts environment instances and runs their episodes inside its own event loop.

A turn costs one Serve-handle call; an episode costs its caller one call to this actor.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from raygym.chat import ChatRenderer
from raygym.config import EnvConfig
from raygym.env import EnvError, env_tools, make_env
from raygym.episode import EpisodeLimits, Generate, run_episode
from raygym.types import EpisodeFailure, FailureKind, Generation, Int32Array, Sampling, Task, Trajectory

# What Ray and Serve raise when the process that held the request is gone.
_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
# Calls beside the episodes, such as `ping`, that must get through when all episode slots are taken.
_SPARE_CONCURRENCY = 16


class ServeGenerate:
    """A `Generate` that calls a Serve deployment's `generate`. The handle is looked up at the first call."""

    def __init__(self, deployment: str, app: str) -> None:
        self._deployment = deployment
        self._app = app
        self._handle: DeploymentHandle[Any] | None = None

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """One continuation. Cancelling the call cancels the request in the replica.

        Raises:
            EpisodeFailure: with the replica's own kind where it raised one, else `engine_lost` when the replica is
                gone, `cancelled` when Serve cancelled the request, and `engine_error` for everything else.
        """
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        # The session keeps an episode on the replica that holds its KV cache.
        handle = self._handle.options(session_id=session_id)
        response = handle.generate.remote(prompt_token_ids, sampling, session_id)
        try:
            generation: Generation = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except Exception as error:
            raise engine_failure(error) from error
        return generation


def engine_failure(error: Exception) -> EpisodeFailure:
    """What an error of a Serve call means for the episode."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, EpisodeFailure):
        return EpisodeFailure(cause.kind, cause.detail)
    kind = FailureKind.ENGINE_ERROR
    if isinstance(cause, _LOST):
        kind = FailureKind.ENGINE_LOST
    elif isinstance(cause, TaskCancelledError):
        kind = FailureKind.CANCELLED
    return EpisodeFailure(kind, f"{type(cause).__name__}: {cause}")


class EnvRunner:
    """Runs any number of episodes at once. Wrapped as a Ray actor by `start_env_runner`."""

    def __init__(
        self,
        envs: Sequence[EnvConfig],
        model_dir: str,
        limits: EpisodeLimits,
        run_seed: int,
        deployment: str = "",
        app: str = "",
        generate: Generate | None = None,
    ) -> None:
        """Load the tokenizer and make each environment once, so that a wrong one is found before any episode.

        Args:
            envs: the run's environments.
            model_dir: the policy's files; only the tokenizer is read.
            limits: what an episode may use.
            run_seed: enters the sampling seeds.
            deployment: the Serve deployment whose `generate` is the policy.
            app: the Serve application of that deployment.
            generate: takes the place of the deployment, in tests.

        Raises:
            EnvError: an environment cannot be made.
            TemplateError: the tokenizer's chat template cannot keep token IDs exact.
        """
        self._limits = limits
        self._run_seed = run_seed
        self._generate = generate or ServeGenerate(deployment, app)
        self._envs = {config.label: config for config in envs}
        self._running = 0
        tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        by_tools: dict[str, ChatRenderer] = {}
        self._renderers: dict[str, ChatRenderer] = {}
        for config in envs:
            tools = _tools_of(config)
            key = json.dumps(tools, sort_keys=True)
            if key not in by_tools:
                by_tools[key] = ChatRenderer(tokenizer, tools)
            self._renderers[config.label] = by_tools[key]

    async def run_episode(
        self, task: Task, group_id: str, episode: int, attempt: int, sampling: Sampling
    ) -> Trajectory:
        """One episode on a fresh environment. Failures of environment or engine come back as a failed trajectory.

        Raises:
            EnvError: the task names an environment that this runner does not host.
        """
        config = self._envs.get(task.env)
        if config is None:
            raise EnvError(
                f"task {task.index} wants environment {task.env!r}; this runner hosts {', '.join(self._envs)}"
            )
        self._running += 1
        try:
            return await run_episode(
                partial(make_env, config.id, config.kwargs),
                task,
                group_id=group_id,
                episode=episode,
                attempt=attempt,
                renderer=self._renderers[task.env],
                generate=self._generate,
                limits=self._limits,
                sampling=sampling,
                run_seed=self._run_seed,
            )
        finally:
            self._running -= 1

    async def ping(self) -> int:
        """How many episodes are running: an answer means that the event loop is alive."""
        return self._running


def _tools_of(config: EnvConfig) -> list[dict[str, Any]]:
    env = make_env(config.id, config.kwargs)
    tools = env_tools(env)
    # An asynchronous `close` needs an event loop, and an environment that was never reset holds nothing yet.
    if not asyncio.iscoroutinefunction(env.close):
        env.close()
    return tools


def start_env_runner(
    envs: Sequence[EnvConfig],
    model_dir: str,
    limits: EpisodeLimits,
    run_seed: int,
    *,
    deployment: str = "",
    app: str = "",
    generate: Generate | None = None,
    max_concurrent: int,
    **actor_options: Any,
) -> ActorHandle[EnvRunner]:
    """Start an EnvRunner actor that runs up to `max_concurrent` episodes at once. Returns before it is up.

    A runner that dies is restarted by Ray, without its episodes: their callers get a RayActorError and retry.

    Args:
        envs: see `EnvRunner`, as are model_dir, limits, run_seed, deployment, app and generate.
        max_concurrent: episodes at once; more wait.
        actor_options: Ray's options for the actor, over the defaults (no CPU reserved, restarted always).
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": max_concurrent + _SPARE_CONCURRENCY,
        **actor_options,
    }
    actor: Any = ray.remote(EnvRunner)
    handle: ActorHandle[EnvRunner] = actor.options(**options).remote(
        list(envs), model_dir, limits, run_seed, deployment, app, generate
    )
    return handle
