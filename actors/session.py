"""Everything that a run has running: cluster, engines, learners, rollouts. Started together, ended together."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack
from functools import partial
from typing import Any

from raygym.actors import cluster, serving
from raygym.actors.app_guard import AppGuard
from raygym.actors.learner_group import LearnerGroup
from raygym.actors.nemo_gym import NemoGym
from raygym.actors.process import freeze_past
from raygym.actors.rollouts import Rollouts
from raygym.actors.supervisor import Supervisor
from raygym.actors.weight_health import WeightHealth
from raygym.actors.weight_sync import WeightSync
from raygym.config import RunConfig
from raygym.rollout_state import RolloutState
from raygym.supervision import Kind

logger = logging.getLogger(__name__)
_FEW_CORES = 4
_POLL_S = 0.1


class Session:
    """A context manager: inside it, everything serves; after it, nothing of it is left, whatever happened."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        port: int,
        *,
        learning: bool = True,
        rolling_out: bool = True,
        resumed: RolloutState | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            config: the run's, with the engine's defaults filled in.
            model_dir: the policy's files.
            port: where the OpenAI API listens.
            learning: with learners and the weight group.
            rolling_out: with EnvRunners and the RolloutManager.
            resumed: where the rollouts of an interrupted run stood.
            supervisor: is told what is lost; by default one with default budgets, which writes nothing.
        """
        self._config = config
        self._model_dir = model_dir
        self._learning = learning
        self._rolling_out = rolling_out
        self._resumed = resumed
        self.supervisor = supervisor or Supervisor(config.supervision)
        self.port = port
        self._stopped = False
        self._app_guard: AppGuard | None = None
        self._deploying: Future[Any] | None = None
        self._learners: LearnerGroup | None = None
        self._nemo_gym: NemoGym | None = None
        self._rollouts: Rollouts | None = None
        self._weights: WeightSync | None = None
        self._engines: Any = None

    @property
    def learners(self) -> LearnerGroup:
        """The learner gang."""
        assert self._learners is not None, "this session was started without learners"
        return self._learners

    @property
    def rollouts(self) -> Rollouts:
        """The rollout manager and its runners."""
        assert self._rollouts is not None, "this session was started without rollouts"
        return self._rollouts

    @property
    def weights(self) -> WeightSync:
        """The weight group."""
        assert self._weights is not None, "this session was started without learners"
        return self._weights

    @property
    def url(self) -> str:
        """Base URL of the OpenAI-compatible API."""
        return f"http://{self._config.policy.http.host}:{self.port}/v1"

    @property
    def first_token_at(self) -> float | None:
        """When the first engine made its first token, in seconds since the epoch.

        None before that, and where a replica was replaced: the first one may be gone.
        """
        if Kind.REPLICA.value in self.supervisor.restarts:
            return None
        return min((state.first_token_at for state in self.weights.serving() if state.first_token_at), default=None)

    def __enter__(self) -> Session:
        try:
            self._start()
        except BaseException as error:
            self._stop(error)
            raise
        return self

    def __exit__(self, _: object = None, error: BaseException | None = None, __: object = None) -> None:
        self._stop(error)

    def _start(self) -> None:
        config = self._config
        cluster.connect()
        # Engines and learners load side by side: each spends most of its start importing and reading files.
        pool = ThreadPoolExecutor(1)
        self._app_guard = AppGuard(serving.app_name(config.name), on_own_cluster=cluster.is_own())
        front = serving.front_options(config)
        arguments = (config.name, config.policy, self._model_dir, self.port, front)
        self._deploying = pool.submit(serving.deploy, *arguments, leased=self._learning)
        pool.shutdown(wait=False)
        if self._learning:
            self._launch_learners()
        if self._rolling_out:
            self._nemo_gym = NemoGym(config, self.url, config.run_dir / "nemo_gym" if self._learning else None)
            max_model_len = serving.context_length(config.policy, self._model_dir)
            placement = self._nemo_gym.placement
            self._leave_cores()
            # Without learners nothing is played for a step to come.
            playing = self._nemo_gym.config.model_copy(update={} if self._learning else {"steps": 0})
            self._rollouts = Rollouts(
                playing, self._model_dir, max_model_len, placement, self._resumed, self.supervisor
            )
            self._rollouts.wait_ready(config.policy.startup_timeout_s)
            self._nemo_gym.wait_ready()
        self._engines = _wait_deployed(self._deploying, config.policy.startup_timeout_s)
        if self._learning:
            self._connect_learners()
        freeze_past()

    def _leave_cores(self) -> None:
        """On few cores, wait with the rollouts' processes until learners or engines are up.

        All import for seconds, and one that is started beside them takes its share from the engine, which is up last.
        """
        if self._learners is None or not cluster.is_own() or (os.cpu_count() or 1) > _FEW_CORES:
            return
        assert self._deploying is not None
        deadline = time.monotonic() + self._config.policy.startup_timeout_s
        while not (self._deploying.done() or self._learners.settled()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def end_learners(self) -> None:
        """End what is left of a lost gang, and give its GPUs back. Nothing of it writes files after this."""
        if self._learners is not None:
            self._learners.kill()
            self._learners = None

    def restart_learners(self) -> None:
        """Start a gang with the starting policy, which is the sender of weights from now on; the engines stay.

        Raises:
            LearnerError: it could not be started.
            WeightsError: it could not be made the sender.
        """
        self.end_learners()
        self._launch_learners()
        self._connect_learners()

    def _launch_learners(self) -> None:
        learner = self._config.learner
        updates = self._config.steps * learner.mini_batches
        self._learners = LearnerGroup.launch(learner, self._model_dir, self._config.rollout.temperature, updates)

    def _connect_learners(self) -> None:
        self.learners.wait_ready()
        if self._weights is not None:
            self._weights.replace_learners(self.learners)
            return
        policy = self._config.policy
        health = WeightHealth(self.supervisor, partial(serving.wanted_replicas, self._config.name))
        self._weights = WeightSync(
            self._config.sync, self.learners, self._engines, policy.replicas, policy.startup_timeout_s, health
        )
        self._weights.connect()

    def _stop(self, error: BaseException | None) -> None:
        """End all of it, the last first; whatever becomes of one, the next is ended. A second time, nothing is left.

        What cannot be ended is told in the log: it must not hide why the run ended.

        A second interrupt skips what is being waited for: the cluster's end, or that of our job, ends it as well.
        """
        if self._stopped:  # Ray would start another cluster to look for what is gone
            return
        self._stopped = True
        with ExitStack() as stack:
            # The logs of a run that failed may say why.
            failed = error is not None and not isinstance(error, KeyboardInterrupt)
            stack.callback(_ended, partial(cluster.disconnect, keep_logs=failed))
            if self._app_guard is not None:
                still = self._deploying is not None and not self._deploying.done()
                undeploy = partial(self._app_guard.undeploy, self._config.name, deploys_still=still)
                stack.callback(_ended, undeploy)
            if self._learners is not None:
                stack.callback(_ended, self._learners.shutdown)
            if self._weights is not None:
                stack.callback(_ended, self._weights.close)
            for part in (self._nemo_gym, self._rollouts):
                if part is not None:
                    stack.callback(_ended, part.shutdown)
            self._app_guard = self._learners = self._weights = self._nemo_gym = self._rollouts = None


def _ended(end: Callable[[], object]) -> None:
    try:
        end()
    except Exception as error:
        logger.warning("a part of the session could not be ended: %s: %s", type(error).__name__, error)


def _wait_deployed(deploying: Future[Any], timeout_s: float) -> Any:
    started = time.monotonic()
    try:
        return deploying.result(timeout=timeout_s)
    except FutureTimeout as error:
        raise TimeoutError(
            f"the PolicyServer was not ready after {time.monotonic() - started:.0f} s (policy.startup_timeout_s)"
        ) from error
