"""A Serve application outlives the job that deployed it. On a cluster that others own, somebody has to remove it."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from raygym.actors import serving
from raygym.config import ConfigError

logger = logging.getLogger(__name__)
_NAMESPACE = "raygym"
_ASK_EVERY_S = 5.0
_ANSWER_TIMEOUT_S = 60.0
# Of a job that was killed a moment ago: until Ray has noticed.
_GONE_WITHIN_S = 10.0
_REMOVED_WITHIN_S = 600.0


class SignOfLife:
    """Belongs to the driver's job, and dies with it for good."""

    def ping(self) -> None:
        """Answers as long as the job lives."""


class AppWatch:
    """A detached actor that removes one application when the job that deployed it has ended, however that was."""

    def watch(self, app: str, sign: Any, ends_serve: bool) -> None:
        """Blocks until the job has ended and the application is gone, then ends this actor.

        An application that cannot be removed for ten minutes is left: the log says so.

        Args:
            app: the Serve application.
            sign: the job's `SignOfLife`.
            ends_serve: the job has started Serve, too; it ends as well, unless there are other applications by then.
        """
        try:
            while not is_dead(sign):
                time.sleep(_ASK_EVERY_S)
            remove_patiently(app, ends_serve)
        finally:
            ray.actor.exit_actor()


class AppGuard:
    """The driver's side. On a cluster of our own nothing is guarded: it ends with the driver, and Serve with it."""

    def __init__(self, app: str, *, on_own_cluster: bool) -> None:
        """Watch from now on; `app` need not be deployed yet.

        Raises:
            ConfigError: another job on this cluster has this application: it may be training with its engines.
        """
        self._watch: Any = None
        self._sign: Any = None
        self._ends_serve = False
        if on_own_cluster:
            return
        name, sign_name = f"guard-{app}", f"sign-{app}"
        require_free(sign_name, app)
        sign: Any = ray.remote(SignOfLife)
        try:
            self._sign = sign.options(name=sign_name, namespace=_NAMESPACE, num_cpus=0, max_restarts=-1).remote()
        except ValueError:  # of two that start at once, Ray gives the name to one
            raise _taken(app) from None
        # One of a run of this name that was killed a moment ago would remove our application.
        with suppress(ValueError):  # there is none
            ray.kill(ray.get_actor(name, namespace=_NAMESPACE))
        self._ends_serve = not serve_runs()
        self._watch = _start_watch(name)
        self._watch.watch.remote(app, self._sign, self._ends_serve)

    def undeploy(self, run_name: str, *, deploys_still: bool = False) -> None:
        """Remove the run's application now, and wait until its replicas are gone.

        Args:
            run_name: the run's.
            deploys_still: a thread may deploy it again after this. So the watch stays, which removes it when this job
                has ended, and the thread with it.
        """
        serving.undeploy(run_name)
        if self._watch is None or deploys_still:
            return
        if self._ends_serve:
            end_unused_serve()
        for actor in (self._watch, self._sign):
            ray.kill(actor)


def _start_watch(name: str) -> Any:
    watch: Any = ray.remote(AppWatch)
    restarted = {"max_restarts": -1, "max_task_retries": -1}
    options = watch.options(name=name, namespace=_NAMESPACE, lifetime="detached", num_cpus=0, **restarted)
    ends = time.monotonic() + _GONE_WITHIN_S
    while True:
        try:
            return options.remote()
        except ValueError:  # the one that was killed just now still has the name
            if time.monotonic() >= ends:
                raise
            time.sleep(0.1)


def require_free(sign_name: str, app: str) -> None:
    """Refuse an application whose job lives.

    Raises:
        ConfigError: its `SignOfLife` is there, and was not found dead within some seconds.
    """
    ends = time.monotonic() + _GONE_WITHIN_S
    while True:
        try:
            sign = ray.get_actor(sign_name, namespace=_NAMESPACE)
        except ValueError:
            return
        if is_dead(sign, max(1.0, ends - time.monotonic())):
            return
        if time.monotonic() >= ends:
            raise _taken(app)
        time.sleep(0.5)


def _taken(app: str) -> ConfigError:
    return ConfigError(
        f"name: a run of this name ({serving.run_name(app)}) is on this cluster, and would lose its engines; wait for "
        "it, stop it, or give this one another name"
    )


def is_dead(sign: Any, timeout_s: float = _ANSWER_TIMEOUT_S) -> bool:
    """Whether a job's `SignOfLife` has ended for good. One that does not answer may be on a busy cluster, or starting
    on another node."""
    try:
        ray.get(sign.ping.remote(), timeout=timeout_s)
    except ActorDiedError:
        return True
    except (GetTimeoutError, RayError):
        return False
    return False


def remove_patiently(app: str, ends_serve: bool) -> None:
    """`remove`, again and again where it fails, as while Serve itself is being restarted; for a bounded time."""
    ends = time.monotonic() + _REMOVED_WITHIN_S
    while True:
        try:
            remove(app, ends_serve)
            return
        except Exception as error:
            if time.monotonic() >= ends:
                logger.error("the application %s could not be removed: %s", app, error)
                return
            logger.warning("the application %s could not be removed yet: %s", app, error)
        time.sleep(_ASK_EVERY_S)


def remove(app: str, ends_serve: bool) -> None:
    """Delete an application; with `ends_serve` Serve itself, too, where nothing else is deployed."""
    if serve_runs():
        serving.undeploy(serving.run_name(app))
        if ends_serve:
            end_unused_serve()


def end_unused_serve() -> None:
    """End Serve's controller and proxies, which are detached actors, unless somebody has an application there."""
    if serve_runs() and not serving.applications():
        serve.shutdown()


def serve_runs() -> bool:
    """Whether this cluster has a Serve instance. Asking Serve itself could start one."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True
