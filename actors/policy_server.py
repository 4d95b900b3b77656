"""The Serve deployment that hosts one engine per replica: token IDs by handle, OpenAI's API over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from prometheus_client import generate_latest
from ray import serve
from ray.exceptions import RayError

from raygym.actors.process import keep_files_in_session, settle_process
from raygym.actors.simulated_deaths import claim_death
from raygym.admission import FencedError
from raygym.api import prometheus
from raygym.api.front import ApiFront, FrontOptions
from raygym.api.gated import Gated
from raygym.api.sessions import SessionStore
from raygym.config import PolicyConfig
from raygym.engine import Engine, EngineError
from raygym.in_flight import InFlight, OnUpdate
from raygym.lease import Beat, ReplicaState
from raygym.replica_weights import Applied, ReplicaWeights
from raygym.simulate import SimulatedConfig, SimulatedEngine
from raygym.stop_tokens import stop_token_ids
from raygym.testing import chaos
from raygym.tool_parsers import tool_parser
from raygym.turn_batch import TurnRequest
from raygym.turn_server import TurnAddress, TurnServer
from raygym.types import EngineLoad, EpisodeFailure, FailureKind, Generation, Int32Array, Sampling
from raygym.weights import VersionOffer

logger = logging.getLogger(__name__)
DEPLOYMENT = "PolicyServer"
_METRICS_TIMEOUT_S = 5.0


async def start_engine(config: PolicyConfig, model_dir: str) -> Engine:
    """The engine that the config asks for. Blocks until it can generate."""
    stops = stop_token_ids(Path(model_dir))
    if config.engine == "simulated":
        simulated = SimulatedConfig(**config.simulated)
        app = serve.get_replica_context().app_name
        may_die = partial(claim_death, app, simulated.deaths)
        return SimulatedEngine(simulated, stops, model_dir, config.model, may_die)
    # Before vLLM, which decides on its files when it is imported.
    keep_files_in_session()
    # vLLM takes ten seconds to import; only a replica that serves it pays.
    from raygym.actors.vllm_engine import VLLMEngine

    parser = tool_parser(config.tool_parser, model_dir)
    engine = VLLMEngine(model_dir, config.model, stops, config.vllm, parser)
    await engine.leave_nothing()
    await engine.set_version(0)
    return engine


@serve.ingress()
class PolicyServer:
    """One replica: an engine, the turns and calls that it serves, and its weights."""

    # Serve awaits a constructor that is a coroutine: the engine needs the replica's event loop.
    async def __init__(  # type: ignore[misc]
        self, config: PolicyConfig, model_dir: str, front: FrontOptions | None = None, leased: bool = False
    ) -> None:
        self._front = front or FrontOptions()
        self._engine = await start_engine(config, model_dir)
        self._requests = self._running = 0
        self._in_flight = InFlight()
        self._request_numbers = itertools.count(1)
        context = serve.get_replica_context()
        self._app_name = context.app_name
        self._rank: int = context.rank.rank
        limits = config.sessions
        self._sessions = SessionStore(
            context.replica_id.unique_id,
            ttl_s=limits.ttl_s,
            max_sessions=limits.max_sessions,
            max_bytes=limits.max_mib << 20,
        )
        self._replica_id: str = context.replica_id.unique_id
        self._turns = TurnServer(self._answer)
        self._weights = ReplicaWeights(
            self._replica_id,
            ray.get_runtime_context().get_node_id(),
            self._engine,
            self._in_flight,
            model_dir,
            leased=leased,
            fenced=self._turns.close,
        )
        settle_process()

    async def __serve_build_asgi_app__(self) -> Any:
        """Serve's late-bound hook: the engine's own HTTP application, behind what training adds to it."""
        app = Gated(await self._engine.asgi_app(), self._in_flight, self._weights.admission)
        front = ApiFront(app, self._sessions, self._front, self._all_metrics)

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await front(scope, receive, send)
            with self._counted():
                return await front(scope, receive, send)

        return counted

    @contextmanager
    def _counted(self) -> Iterator[int]:
        self._requests += 1
        self._running += 1
        try:
            yield self._requests
        finally:
            self._running -= 1

    async def metrics(self) -> tuple[str, str, int, int]:
        """This replica's rank, exposition, requests so far and requests running."""
        self._sessions.expire()
        sessions = prometheus.gauge("raygym_open_sessions", "Recorded sessions that are open.", len(self._sessions))
        return str(self._rank), generate_latest().decode() + sessions, self._requests, self._running

    async def load(self) -> tuple[str, EngineLoad]:
        """This replica's name, another one after a restart, and its engine's load."""
        return self._replica_id, self._engine.load()

    async def _all_metrics(self) -> str:
        handle = serve.get_deployment_handle(DEPLOYMENT, self._app_name)
        try:
            answers = await asyncio.to_thread(handle.broadcast("metrics").results, timeout_s=_METRICS_TIMEOUT_S)
        except (TimeoutError, RayError):
            answers = [await self.metrics()]  # a replica is hung or dying: this one's are better than none
        return prometheus.merged(
            {rank: text for rank, text, _, _ in answers}, {rank: (given, now) for rank, _, given, now in answers}
        )

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """Sample one continuation of exactly these IDs.

        Args:
            prompt_token_ids: P token IDs, int32.
            sampling: how to sample.
            session_id: the episode; part of the request's name in the engine's log.

        Raises:
            EpisodeFailure: `engine_lost` where this replica has no current weights, else `engine_error`, with the
                engine's reason.
        """

        def generation() -> Coroutine[Any, Any, Generation]:
            # A restarted turn is a new request: the engine may not have forgotten the first one's name yet.
            request_id = f"{session_id}-{next(self._request_numbers)}"
            return self._engine.generate(prompt_token_ids, sampling, request_id)

        with self._counted():
            try:
                fences = await self._weights.admission.enter()
                answer = await self._in_flight.run(generation)
                await self._weights.admission.leave(fences)
                chaos.at("replica.turn")
                return answer
            except FencedError as error:
                raise EpisodeFailure(FailureKind.ENGINE_LOST, str(error)) from error
            except Exception as error:
                raise EpisodeFailure(FailureKind.ENGINE_ERROR, f"{type(error).__name__}: {error}") from error

    async def turn_address(self) -> TurnAddress:
        """Where EnvRunners send this replica their turns.

        Raises:
            EpisodeFailure: `engine_lost`, it has no current weights, or its engine is dead.
        """
        if not self._weights.admission.admitted:  # nor one whose engine is dead, see `ReplicaWeights.fail`
            raise EpisodeFailure(FailureKind.ENGINE_LOST, f"replica {self._replica_id} may not serve now")
        return await self._turns.address(self._replica_id, ray.util.get_node_ip_address())

    async def _answer(self, request: TurnRequest) -> Generation:
        try:
            return await self.generate(request.prompt_token_ids, request.sampling, request.session_id)
        except EpisodeFailure:
            await self._refuse_turns_if_dead()
            raise

    async def _refuse_turns_if_dead(self) -> None:
        """A dead engine fails at once, so the replica would look idle and draw all turns until Serve replaces it."""
        with suppress(Exception):  # whom it is told
            await self.check_health()

    async def misfit(self, shapes: dict[str, tuple[int, ...]]) -> str:
        """See `ReplicaWeights`."""
        return self._weights.misfit(shapes)

    async def beat(self, beat: Beat) -> ReplicaState:
        """See `ReplicaWeights`."""
        return self._weights.beat(beat)

    async def update(
        self, offer: VersionOffer, on_update: OnUpdate, finish_timeout_s: float, load_timeout_s: float
    ) -> Applied:
        """See `ReplicaWeights`. After an error inside the engine the replica reports itself unhealthy."""
        return await self._weights.update(offer, on_update, finish_timeout_s, load_timeout_s)

    async def state(self) -> ReplicaState:
        """Which weights this replica serves."""
        return self._weights.state()

    async def check_health(self) -> None:
        """Serve's health check: raises when this replica must be replaced."""
        if self._weights.failure is None:
            try:
                await self._engine.check_health()
            except Exception as error:
                logger.error("replica %s takes no more turns, its engine is dead: %s", self._replica_id, error)
                self._weights.fail(error)
        if (failure := self._weights.failure) is not None:
            raise EngineError(f"replica {self._rank} has to be replaced: {failure}") from failure

    def __del__(self) -> None:
        """Serve's graceful shutdown: end the engine's processes with the replica."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()
