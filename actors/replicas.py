"""The replicas as the driver of a run knows them: it beats, they answer, and those with current weights serve."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve.handle import DeploymentHandle

from raygym.actors.replica_calls import call_replicas
from raygym.actors.weight_health import WeightHealth
from raygym.lease import LeaseBook, ReplicaState
from raygym.supervision import Kind
from raygym.weights import WeightsId

logger = logging.getLogger(__name__)
_BEATS_IN_A_LEASE = 6
_LONGEST_BEAT_S, _SHORTEST_BEAT_S = 2.0, 0.25
# A replica that Serve has replaced is forgotten after so many leases of silence.
_FORGOTTEN_AFTER = 20


class Replicas:
    """Beats from a thread of its own until it is closed. Thread-safe."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        lease_s: float,
        behind: Callable[[], None],
        health: WeightHealth,
    ) -> None:
        """Nothing beats yet.

        Args:
            handle: of the deployment.
            lease_s: how long a replica serves after the last confirmation.
            behind: called by the beating thread when replicas that answer do not hold the current weights.
            health: is told of replicas that are fenced and admitted.
        """
        self.handle = handle
        self._book = LeaseBook(lease_s)
        self._behind = behind
        self._health = health
        self._every_s = min(_LONGEST_BEAT_S, lease_s / _BEATS_IN_A_LEASE)
        self._rounds_s = time.monotonic()
        self._changed = threading.Condition()  # guards the book
        self._at_once = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="replicas", daemon=True)
        self.calls = 0
        """Remote calls that were made, beats not counted."""

    @property
    def epoch(self) -> int:
        """Of the membership: one more with each replica that is admitted or fenced."""
        return self._book.epoch

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def close(self) -> None:
        """Beat no more. Replicas go on until their leases end."""
        self._closed = True
        self._at_once.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _LONGEST_BEAT_S)

    def updating(self, weights: WeightsId) -> None:
        """These become current. Those before them are served, too, until `fence_the_rest`."""
        with self._changed:
            self._book.updating(weights)
            self._changed.notify_all()

    def call(self, method: str, *args: Any, timeout_s: float, tick_s: float | None = None) -> Iterator[Any]:
        """See `call_replicas`."""
        for answer in call_replicas(self.handle, method, *args, timeout_s=timeout_s, tick_s=tick_s):
            self.calls += answer is not None
            yield answer

    def heard(self, state: ReplicaState) -> None:
        """A replica has answered something."""
        with self._changed:
            admitted = self._book.heard(state)
            self._changed.notify_all()
        if admitted:
            logger.info("replica %s serves version %d", state.replica, state.weights.version)
            self._health.works(Kind.REPLICA, state.replica)

    def admitted(self) -> set[str]:
        """Names of the replicas that were admitted and not fenced since."""
        with self._changed:
            return self._book.admitted()

    def unanswered(self, wanted: set[str], answered: set[str]) -> bool:
        """Whether a wanted replica that is still there, or one that may be serving, has not answered yet."""
        with self._changed:
            return bool(((wanted & self._book.answering()) | self._book.may_serve()) - answered)

    def fence_the_rest(self) -> None:
        """Grant nothing to replicas that do not hold the current weights, and wait until none of them can serve.

        Takes at most a lease.
        """
        with self._changed:
            self._book.updated()
            version = self._book.weights.version
            fenced = [name for name in self._others() if self._book.fence(name)]
            serving = len(self._book.serving())
        for name in fenced:
            self._lost(name, f"did not come to version {version} in time", serving)
        self._at_once.set()
        with self._changed:
            # Those that answer say that they have ended their leases; the others' end by themselves.
            while late := self._others() & self._book.may_serve():
                until_s = max(self._book.may_serve_until_s(name) for name in late)
                self._changed.wait(max(0.01, until_s - time.monotonic()))
        self._at_once.set()

    def wait_until(self, condition: Callable[[LeaseBook], bool], deadline: float) -> bool:
        """Wait until something holds, at most until `deadline` (monotonic). Whether it does.

        Raises what `WeightHealth.check` raises.
        """
        self._at_once.set()
        with self._changed:
            while not condition(self._book):
                self._health.check()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(min(left_s, self._every_s))
                if time.monotonic() - self._rounds_s > _SHORTEST_BEAT_S:
                    self._at_once.set()
            return True

    @contextmanager
    def book(self) -> Iterator[LeaseBook]:
        """What is known at this moment; read it only."""
        with self._changed:
            yield self._book

    def _others(self) -> set[str]:
        return set(self._book.known()) - {state.replica for state in self._book.current()}

    def _lost(self, name: str, why: str, serving: int) -> None:
        logger.warning("replica %s is fenced: it %s", name, why)
        self._health.lost(Kind.REPLICA, name, why, serving)

    def _run(self) -> None:
        while not self._closed:
            self._at_once.clear()
            try:
                self._go_round()
            except Exception as error:  # without beats no replica serves: the run has to know
                logger.exception("beats to the replicas have ended")
                self._health.failed(error)
                return
            self._at_once.wait(self._every_s)

    def _beat(self, beat: Any) -> None:
        try:
            for answer in call_replicas(self.handle, "beat", beat, timeout_s=self._book.lease_s):
                if isinstance(answer, ReplicaState):
                    self.heard(answer)
        except Exception as error:  # Serve itself is going or coming; the next beat tries again
            logger.debug("a beat failed: %s", error)

    def _go_round(self) -> None:
        """Beat, fence who is silent, forget who is gone, and see that those that are behind catch up."""
        with self._changed:
            now_s = time.monotonic()
            if (stood_still_s := now_s - self._rounds_s) > self._book.lease_s / 2:
                # This process was stopped, or its machine: nobody could be heard.
                self._book.stood_still(stood_still_s)
            self._rounds_s = now_s
            beat = self._book.beat()
        # Answers come in a thread of their own: one that is late must not delay the next beat.
        threading.Thread(target=self._beat, args=(beat,), name="beat", daemon=True).start()
        with self._changed:
            silent = [name for name in self._book.silent() if name not in self._book.may_serve()]
            fenced = {name: self._book.why_silent(name) for name in silent if self._book.fence(name)}
            serving = len(self._book.serving())
            for name in silent:
                if self._book.silent_s(name) > _FORGOTTEN_AFTER * self._book.lease_s:
                    self._book.forget(name)
            behind = bool(self._book.behind())
        for name, why in fenced.items():
            self._lost(name, why, serving)
        if behind:
            self._behind()
