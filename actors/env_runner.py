"""The EnvRunner: hosts environment instances and runs their episodes inside its own event loop.

A turn is a message on a connection to a replica; episodes begin and end many to a call of this actor.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from secrets import token_hex
from typing import Any

import ray
from ray.actor import ActorHandle

from raygym.actors.env_process import EnvProcesses
from raygym.actors.process import settle_process
from raygym.actors.served_version import ServedVersion
from raygym.actors.turn_exchange import TurnExchange
from raygym.chat import ChatRenderer
from raygym.config import EnvConfig
from raygym.env import EnvError, env_tools, make_env
from raygym.env_host import EnvHost, Host
from raygym.episode import EpisodeLimits, Generate, run_episode
from raygym.episode_exchange import Client, EpisodeRequest, EpisodeServer, Finished
from raygym.memory_limit import limit_memory, machine_memory_mib
from raygym.nemo_gym.agent import run_agent_episode
from raygym.places import Places
from raygym.tokenizer_loading import load_tokenizer
from raygym.tool_calls import ToolCalls
from raygym.tool_parsers import tool_parser
from raygym.tracking.otlp import TracingOptions, start_tracing
from raygym.tracking.spans import Traces
from raygym.types import EpisodeFailure, FailureKind, Sampling, Task, Trajectory

logger = logging.getLogger(__name__)
# Calls beside the episodes, such as `ping`, that must get through when all episode slots are taken.
_SPARE_CONCURRENCY = 16
# Environments may have other tools for each task; their renderers cost milliseconds to verify.
_RENDERERS_KEPT = 256
_FLUSH_TIMEOUT_MS = 5000
_NOBODY_WAITS = "its RolloutManager is gone"


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
        parser: str = "auto",
        memory_mib: int | None = None,
        tracing: TracingOptions | None = None,
    ) -> None:
        """Load the tokenizer and make each environment once, so that a wrong one is found before any episode.

        Args:
            envs: the run's environments.
            model_dir: the policy's files; only the tokenizer is read.
            limits: what an episode may use, where its environment's config says nothing else.
            run_seed: enters the sampling seeds.
            deployment: the Serve deployment whose `generate` is the policy.
            app: the Serve application of that deployment.
            generate: takes the place of the deployment, in tests.
            parser: `policy.tool_parser`.
            memory_mib: what the environments in this process may allocate together; 0: half of the machine's memory,
                None: no limit.
            tracing: where spans of the episodes are sent; None: nowhere.

        Raises:
            EnvError: an environment cannot be made.
            TemplateError: the tokenizer's chat template cannot keep token IDs exact.
            ToolCallError: an environment has tools and `parser` cannot find their calls.
        """
        self._spans: Any = start_tracing(tracing) if tracing is not None else None
        self._traces = Traces(self._spans.get_tracer("raygym") if self._spans is not None else None)
        self._limits = limits
        self._run_seed = run_seed
        self._generate = generate or TurnExchange(deployment, app)
        self._served_version = ServedVersion(deployment, app)
        self._envs = {config.label: config for config in envs}
        self._places = Places()
        # Episodes that run or wait for their place, and the number of their attempt.
        self._incarnation = token_hex(8)
        self._episodes: dict[asyncio.Task[Any], int] = {}
        self._first_attempt = 0
        self._asked = EpisodeServer(self._run_asked)
        self._tokenizer = load_tokenizer(model_dir)
        self._parser = tool_parser(parser, model_dir)
        self._renderers: OrderedDict[str, ChatRenderer] = OrderedDict()
        self._processes = {config.label: EnvProcesses(config) for config in envs if config.isolation == "actor"}
        for config in envs:
            self._renderer(_tools_of(config))
        if memory_mib is not None:
            limit_memory(memory_mib or machine_memory_mib() // 2)
        settle_process()

    async def run_episode(
        self,
        task: Task,
        group_id: str,
        episode: int,
        attempt: int,
        sampling: Sampling,
        places: int | None = None,
        first_attempt: int = 0,
    ) -> Trajectory:
        """One episode on a fresh environment. Failures of environment or engine come back as a failed trajectory.

        Args:
            task: what to play.
            group_id: see `run_episode` in `raygym.episode`, as the next three.
            episode: as there.
            attempt: as there.
            sampling: as there.
            places: how many episodes may ask the policy here at once from now on; this one waits for its place. None:
                any number.
            first_attempt: as there.

        Raises:
            EnvError: the task names an environment that this runner does not host.
            EpisodeFailure: `cancelled`, see `abandon_before`.
        """
        config = self._envs.get(task.env)
        if config is None:
            raise EnvError(
                f"task {task.index} wants environment {task.env!r}; this runner hosts {', '.join(self._envs)}"
            )
        if attempt < self._first_attempt:
            raise EpisodeFailure(FailureKind.CANCELLED, _NOBODY_WAITS)
        running = asyncio.current_task()
        assert running is not None
        self._episodes[running] = attempt
        # Now, not when it asks for its place, which may be minutes later: another number can have come by then.
        self._places.resize(places)
        place = self._places.held()
        try:
            with self._traces.episode(task, group_id, episode, attempt) as trace:
                if config.nemo_gym is not None and config.nemo_gym.mode == "agent":
                    async with place:
                        played = await run_agent_episode(
                            config.kwargs["play"],
                            task,
                            group_id=group_id,
                            episode=episode,
                            attempt=attempt,
                            served_version=self._served_version,
                            renderer_for=self._renderer,
                            limits=self._limits.for_env(config),
                            sampling=sampling,
                        )
                        return trace.ended(played)
                async with self._host(config) as host:
                    played = await run_episode(
                        trace.host(host),
                        task,
                        group_id=group_id,
                        episode=episode,
                        attempt=attempt,
                        renderer_for=self._renderer,
                        generate=trace.generate(self._generate),
                        limits=self._limits.for_env(config),
                        sampling=sampling,
                        run_seed=self._run_seed,
                        place=place,
                        first_attempt=first_attempt,
                    )
                    return trace.ended(played)
        except asyncio.CancelledError:
            if attempt < self._first_attempt:
                raise EpisodeFailure(FailureKind.CANCELLED, _NOBODY_WAITS) from None
            raise
        finally:
            del self._episodes[running]

    async def exchange(
        self, client: Client, begin: Sequence[EpisodeRequest], cancelled: Sequence[int], wait_s: float
    ) -> Finished:
        """`run_episode` for a RolloutManager, many in one call; see `EpisodeServer.exchange`."""
        return await self._asked.exchange(client, begin, cancelled, wait_s)

    async def _run_asked(self, asked: EpisodeRequest) -> Trajectory:
        return await self.run_episode(
            asked.task,
            asked.group_id,
            asked.episode,
            asked.attempt,
            asked.sampling,
            asked.places,
            asked.first_attempt,
        )

    async def ping(self) -> str:
        """What tells this process from those before and after it: an answer means that the event loop is alive."""
        return self._incarnation

    async def running(self) -> int:
        """How many episodes run or wait for their place."""
        return len(self._episodes)

    async def flush_spans(self) -> None:
        """Return when the spans of the episodes that have ended are sent, or cannot be."""
        if self._spans is not None:
            await asyncio.to_thread(self._spans.force_flush, _FLUSH_TIMEOUT_MS)

    async def resize(self, places: int) -> None:
        """How many episodes may run here at once from now on; those that run go on."""
        self._places.resize(places)

    async def abandon_before(self, attempt: int) -> None:
        """Nobody waits for attempts of a lower number: end those that run, and refuse those that still come.

        Their RolloutManager is gone, and without this they would hold their places up to their deadlines.
        """
        self._first_attempt = attempt
        for episode, number in self._episodes.items():
            # Once: a second one would cut off the closing of its environment.
            if number < attempt and not episode.cancelling():
                episode.cancel()

    @asynccontextmanager
    async def _host(self, config: EnvConfig) -> AsyncIterator[Host]:
        if config.isolation == "shared":
            yield EnvHost(partial(make_env, config.id, config.kwargs))
            return
        # Waiting for a free process is no part of the episode: its deadlines begin when it has one.
        async with self._processes[config.label].host() as host:
            yield host

    def _renderer(self, tools: Sequence[dict[str, Any]]) -> ChatRenderer:
        key = json.dumps(tools, sort_keys=True, default=str)
        if key not in self._renderers:
            template = getattr(self._tokenizer, "response_template", None)
            calls = ToolCalls(self._parser, tools, template)
            self._renderers[key] = ChatRenderer(self._tokenizer, tools, calls=calls)
        self._renderers.move_to_end(key)
        while len(self._renderers) > _RENDERERS_KEPT:
            self._renderers.popitem(last=False)
        return self._renderers[key]


def _tools_of(config: EnvConfig) -> list[dict[str, Any]]:
    env = make_env(config.id, config.kwargs)
    tools = env_tools(env)
    # An asynchronous `close` needs an event loop, and an environment that was never reset holds nothing yet.
    if not asyncio.iscoroutinefunction(env.close):
        try:
            env.close()
        except Exception:  # whatever a user's method raises: episodes log it as well and go on
            logger.warning("%s.close() raised", type(env).__name__, exc_info=True)
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
    parser: str = "auto",
    memory_mib: int = 0,
    tracing: TracingOptions | None = None,
    max_concurrent: int,
    **actor_options: Any,
) -> ActorHandle[EnvRunner]:
    """Start an EnvRunner actor for up to `max_concurrent` episodes at once. Returns before it is up.

    A runner that dies is restarted by Ray, without its episodes: their callers get a RayActorError and retry.

    Args:
        envs: see `EnvRunner`, as are all others up to tracing.
        max_concurrent: episodes at once; as many more may wait in it for their place.
        actor_options: Ray's options, over the defaults (no CPU reserved, spread over nodes, restarted always).
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        # By default actors that reserve nothing may all go to one node.
        "scheduling_strategy": "SPREAD",
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 2 * max_concurrent + _SPARE_CONCURRENCY,
        **actor_options,
    }
    actor: Any = ray.remote(EnvRunner)
    handle: ActorHandle[EnvRunner] = actor.options(**options).remote(
        list(envs), model_dir, limits, run_seed, deployment, app, generate, parser, memory_mib, tracing
    )
    return handle
