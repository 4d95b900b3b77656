"""A Serve application outlives the job that deployed it. On a cluster that others own, somebody has to remove it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError

from raygym.actors import serving

_NAMESPACE = "raygym"
_ASK_EVERY_S = 5.0
_ANSWER_TIMEOUT_S = 60.0


class SignOfLife:
    """Belongs to the driver's job, and dies with it for good."""

    def ping(self) -> None:
        """Answers as long as the job lives."""


class AppWatch:
    """A detached actor that removes one application when the job that deployed it has ended, however that was."""

    def watch(self, app: str, sign: Any, ends_serve: bool) -> None:
        """Blocks until the job has ended and the application is gone, then ends this actor.

        Args:
            app: the Serve application.
            sign: the job's `SignOfLife`.
            ends_serve: the job has started Serve, too; it ends as well, unless there are other applications by then.
        """
        while True:
            try:
                ray.get(sign.ping.remote(), timeout=_ANSWER_TIMEOUT_S)
            except ActorDiedError:
                break
            except (GetTimeoutError, RayActorError):
                continue  # a busy cluster, or it is being restarted on another node
            time.sleep(_ASK_EVERY_S)
        remove(app, ends_serve)
        ray.actor.exit_actor()


class AppGuard:
    """The driver's side. On a cluster of our own nothing is guarded: it ends with the driver, and Serve with it."""

    def __init__(self, app: str, *, on_own_cluster: bool) -> None:
        """Watch from now on; `app` need not be deployed yet."""
        self._watch: Any = None
        self._sign: Any = None
        self._ends_serve = False
        if on_own_cluster:
            return
        name = f"guard-{app}"
        # One of a run of this name that was killed a moment ago would remove our application.
        with suppress(ValueError):  # there is none
            ray.kill(ray.get_actor(name, namespace=_NAMESPACE))
        self._ends_serve = not serve_runs()
        sign: Any = ray.remote(SignOfLife)
        self._sign = sign.options(num_cpus=0, max_restarts=-1).remote()
        watch: Any = ray.remote(AppWatch)
        options = watch.options(name=name, namespace=_NAMESPACE, lifetime="detached", num_cpus=0)
        self._watch = options.remote()
        self._watch.watch.remote(app, self._sign, self._ends_serve)

    def undeploy(self, run_name: str) -> None:
        """Remove the run's application now, and wait until its replicas are gone."""
        serving.undeploy(run_name)
        if self._watch is None:
            return
        if self._ends_serve:
            end_unused_serve()
        for actor in (self._watch, self._sign):
            ray.kill(actor)


def remove(app: str, ends_serve: bool) -> None:
    """Delete an application; with `ends_serve` Serve itself, too, where nothing else is deployed."""
    if serve_runs():
        serve.delete(app, _blocking=True)
        if ends_serve:
            end_unused_serve()


def end_unused_serve() -> None:
    """End Serve's controller and proxies, which are detached actors, unless somebody has an application there."""
    if serve_runs() and not serve.status().applications:
        serve.shutdown()


def serve_runs() -> bool:
    """Whether this cluster has a Serve instance. Asking Serve itself could start one."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True
