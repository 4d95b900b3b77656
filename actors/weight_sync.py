"""New weights from the learners to every replica; one that cannot take them is fenced until it can. Driver side."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from raygym.actors.learner_group import LearnerError, LearnerGroup
from raygym.actors.replicas import Replicas
from raygym.actors.store_group import StoreGroup
from raygym.actors.weight_health import WeightHealth
from raygym.config import SyncConfig
from raygym.lease import LeaseBook, ReplicaState
from raygym.replica_weights import Applied
from raygym.sent_version import SentVersion
from raygym.weight_checksums import model_checksum
from raygym.weights import (
    Manifest,
    Published,
    Sending,
    VersionOffer,
    WeightsError,
    WeightsId,
    buckets_of,
)

logger = logging.getLogger(__name__)
_RESENDS = 3
_TICK_S = 0.1
_CATCH_UP_EVERY_S = 0.5


@dataclass(slots=True)
class _Outcome:
    """Of one offer, by replica."""

    applied: dict[str, Applied] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        return [*(applied.problem for applied in self.applied.values() if applied.problem), *self.lost]


class WeightSync:
    """The learners' weights, the stores of the nodes, and the replicas. One version is current at a time."""

    def __init__(
        self,
        config: SyncConfig,
        learners: LearnerGroup,
        engines: DeploymentHandle[ReplicaState],
        replicas: int,
        startup_timeout_s: float = 600.0,
        health: WeightHealth | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            config: `sync` of the run.
            learners: that have the weights.
            engines: the deployment.
            replicas: how many it starts with.
            startup_timeout_s: how long a replica may take until it serves, where there is no other.
            health: is told of what is lost and what works again.
        """
        self._config = config
        self._learners = learners
        self._count = replicas
        self._startup_timeout_s = startup_timeout_s
        self._health = health or WeightHealth()
        self._behind = threading.Event()
        self._replicas = Replicas(engines, config.lease_s, self._behind.set, self._health)
        self._manifest = Manifest("float32", ())
        self._stores: StoreGroup | None = None
        self._slot = 0
        self._sending = Sending()
        """How the current version is sent again."""
        self._whole = True
        """Whether it is in each store."""
        self._since_whole = 0
        """Versions since the last that was sent whole."""
        self._offer: VersionOffer | None = None
        # One at a time: a version that is sent, or replicas that catch up.
        self._lock = threading.Lock()
        self._closed = False
        self._catching_up = threading.Thread(target=self._catch_up, name="weight-catch-up", daemon=True)

    @property
    def epoch(self) -> int:
        """Of the membership: one more with each replica that is admitted or fenced."""
        return self._replicas.epoch

    def start_from(self, weights: WeightsId) -> None:
        """The replicas hold these, not the files that they were started from; before `connect`."""
        self._replicas.updating(weights)

    def connect(self) -> None:
        """Agree on what a version consists of, reserve the memory for it, and let the replicas serve.

        Raises:
            WeightsError: engine and learner do not hold the same tensors, or a node has too little memory.
            TimeoutError: not all replicas answer within `sync.timeout_s`.
            LearnerError: learner 0 does not answer.
        """
        self._replicas.start()
        self._catching_up.start()
        self._connect_learners()
        deadline = time.monotonic() + self._config.timeout_s
        shapes = {tensor.name: tensor.shape for tensor in self._manifest.tensors}
        for answer in self._replicas.call("misfit", shapes, timeout_s=self._config.timeout_s):
            if isinstance(answer, str) and answer:
                raise WeightsError(answer)
        if not self._replicas.wait_until(lambda book: len(book.serving()) >= self._count, deadline):
            with self._replicas.book() as book:
                found = len(book.serving())
            raise TimeoutError(
                f"{found} of {self._count} replicas answer and hold the policy's starting weights after "
                f"{self._config.timeout_s:g} s (sync.timeout_s)"
            )
        self._ensure_stores()

    def replace_learners(self, learners: LearnerGroup) -> None:
        """Another gang sends from now on. Replicas keep what they have until it is published to them.

        Raises:
            LearnerError: learner 0 does not answer.
            WeightsError: its node can have no store.
        """
        with self._lock:
            self._learners = learners
            self._offer = None
            if self._stores is not None:
                self._stores.close()
            self._connect_learners()
            self._ensure_stores()

    def publish(self, version: int) -> Published:
        """Send the learners' current weights as `version`; returns when no replica serves others.

        Replicas that do not come to them in time are fenced, and catch up as soon as they can. Where none does, it is
        waited for one that starts anew.

        Raises:
            LearnerError: a learner failed.
            WeightsError: no replica serves the version in time.
            GivenUp: replicas or stores were lost more often than the config allows.
        """
        self._health.check()
        with self._lock:
            calls, before = self._calls(), self._replicas.admitted()
            started = time.monotonic()
            threshold = self._threshold()
            # What is sent whole needs no store that holds the version before.
            self._ensure_stores(filled=threshold is not None)
            if not self._whole:  # what receivers hold is not in learner 0's store any more
                threshold = None
            slot = 1 - self._slot
            sent = self._send(slot, self._buckets(None), Sending(threshold=threshold))
            self._since_whole = 0 if threshold is None else self._since_whole + 1
            broadcasted = time.monotonic()
            self._slot, self._sending, self._whole = slot, Sending(sent.updates, threshold, whole=True), True
            offer = self._offer = self._offered(WeightsId(version, model_checksum(sent.checksums)), sent.checksums)
            self._replicas.updating(offer.weights)
            outcome, resent = self._update(offer, before)
            offer = self._offer
            self._replicas.fence_the_rest()
            fenced = before - self._replicas.admitted()
            calls = self._calls() - calls
        self._require_one(version, outcome)
        applied = list(outcome.applied.values())
        seconds = dict(sent.seconds)
        for part in ("verify", "load"):
            seconds[part] = max((each.seconds.get(part, 0.0) for each in applied), default=0.0)
        return Published(
            version,
            offer.weights.checksum,
            self._manifest.nbytes,
            broadcasted - started,
            time.monotonic() - broadcasted,
            turns_restarted=sum(each.turns_restarted for each in applied),
            turns_late=sum(each.turns_late for each in applied),
            replicas=len(self.serving()),
            fenced=len(fenced),
            resent_buckets=resent,
            control_calls=calls,
            seconds=seconds,
            sent_nbytes=delta.nbytes if (delta := sent.summary()) else self._manifest.nbytes,
            sent_share=delta.sent_share if delta else 1.0,
            largest_error=delta.largest_error if delta else 0.0,
        )

    def check(self) -> None:
        """Raises GivenUp where replicas or stores were lost too often, or what has ended one of the threads here.

        Call it now and then while others are asked.
        """
        self._health.check()

    def serving(self) -> list[ReplicaState]:
        """The replicas that serve the current version."""
        with self._replicas.book() as book:
            return book.serving()

    def settle(self, timeout_s: float, replicas: int = 1) -> list[ReplicaState]:
        """Wait until all replicas that answer, and at least so many, serve the current version; returns who does.

        Raises what `check` raises.
        """

        def settled(book: LeaseBook) -> bool:
            serving = len(book.serving())
            return serving >= replicas and serving == len(book.current()) and not book.behind()

        self._replicas.wait_until(settled, time.monotonic() + timeout_s)
        return self.serving()

    def close(self) -> None:
        """End the stores, and confirm nothing any more."""
        self._closed = True
        self._behind.set()
        self._replicas.close()
        self._health.close()
        if self._catching_up.is_alive():
            self._catching_up.join(timeout=self._config.timeout_s)
        if self._stores is not None:
            self._stores.close()

    def _connect_learners(self) -> None:
        timeout_s = self._config.timeout_s
        self._manifest = self._learners.call_first(
            "weight_manifest", self._config.bucket_mib << 20, timeout_s=timeout_s
        )
        self._stores = StoreGroup(self._manifest, self._learners, timeout_s, self._health)

    def _ensure_stores(self, filled: bool = True) -> None:
        """There is a store on each node with a replica; `filled`: with the current version in it, if there is one."""
        assert self._stores is not None, "connect() first"
        with self._replicas.book() as book:
            nodes = book.nodes()
        new = self._stores.ensure(nodes, self._slot if filled and self._offer is not None else None)
        if new and self._offer is not None:
            self._whole &= self._stores.sender_node not in new
            self._offer = self._offered(self._offer.weights, dict(self._offer.checksums))

    def _offered(self, weights: WeightsId, checksums: dict[str, int]) -> VersionOffer:
        assert self._stores is not None
        return VersionOffer(weights, self._stores.paths(self._slot), checksums)

    def _buckets(self, names: set[str] | None) -> list[int]:
        return list(range(len(self._manifest.buckets))) if names is None else buckets_of(self._manifest, names)

    def _send(self, slot: int, buckets: list[int], sending: Sending) -> SentVersion:
        assert self._stores is not None
        return self._stores.send(slot, buckets, sending)

    def _threshold(self) -> float | None:
        """With `sync.mode: delta`, of the next version; None: it is sent whole."""
        delta = self._config.delta
        if delta is None or self._offer is None or self._since_whole + 1 >= delta.full_every:
            return None
        return delta.threshold

    def _update(self, offer: VersionOffer, wanted: set[str]) -> tuple[_Outcome, int]:
        """Offer it, and again what did not arrive whole, until the wanted replicas have answered or are gone.

        Returns also how many buckets were sent again. The offer may be another one afterwards.
        """
        resent = 0
        outcome = self._offer_to_all(offer, wanted)
        for _ in range(_RESENDS):
            names: set[str] | None = outcome.changed
            if outcome.problems() and self._lost_stores():
                self._whole = False
            if not self._whole:
                names = None
            elif not names:
                break
            buckets = self._buckets(names)
            logger.warning("buckets %s did not arrive whole and are sent again", buckets)
            resent += len(buckets)
            offer = self._resent(offer, buckets)
            self._whole = True
            again = self._offer_to_all(offer, wanted)
            again.applied = {name: _latest(outcome.applied.get(name), found) for name, found in again.applied.items()}
            outcome = again
        return outcome, resent

    def _resent(self, offer: VersionOffer, buckets: list[int]) -> VersionOffer:
        """Send buckets of the current version again."""
        lost = not self._whole and self._sending.threshold is not None
        # What was left out of it was relative to a version that is gone with its store.
        sent = self._send(self._slot, buckets, replace(self._sending, threshold=None) if lost else self._sending)
        checksums = {**offer.checksums, **sent.checksums}
        self._offer = self._offered(WeightsId(offer.weights.version, model_checksum(checksums)), checksums)
        if self._offer.weights != offer.weights:
            self._replicas.updating(self._offer.weights)
        return self._offer

    def _lost_stores(self) -> bool:
        """Whether a store was lost; there is a new one in its place then, which has nothing in it."""
        assert self._stores is not None
        if not self._stores.check():
            return False
        self._ensure_stores(filled=False)
        return True

    def _offer_to_all(self, offer: VersionOffer, wanted: set[str]) -> _Outcome:
        """What became of it. Whoever serves or is wanted is waited for, unless it falls silent."""
        outcome = _Outcome()
        config = self._config
        arguments = (offer, config.on_update, config.finish_timeout_s, config.timeout_s)
        for answer in self._replicas.call("update", *arguments, timeout_s=config.timeout_s, tick_s=_TICK_S):
            if isinstance(answer, Applied):
                self._replicas.heard(answer.state)
                outcome.applied[answer.state.replica] = answer
                outcome.changed.update(answer.changed)
                if answer.problem:
                    logger.warning("replica %s: %s", answer.state.replica, answer.problem)
            elif answer is not None:
                outcome.lost.append(f"{type(answer).__name__}: {answer}")
            elif not self._replicas.unanswered(wanted, set(outcome.applied)):
                break  # whoever has not answered serves nothing any more
        return outcome

    def _require_one(self, version: int, outcome: _Outcome) -> None:
        """Wait for a replica that serves the version; one that starts anew catches up by the other thread."""
        deadline = time.monotonic() + self._startup_timeout_s
        if not self._replicas.wait_until(lambda book: bool(book.serving()), deadline):
            why = "; ".join(outcome.problems()) or "no replica answers"
            raise WeightsError(
                f"no replica serves version {version} after {self._startup_timeout_s:g} s "
                f"(policy.startup_timeout_s): {why}"
            )

    def _catch_up(self) -> None:
        """Bring replicas that are behind to the current version: those that start anew, and those that were fenced."""
        while not self._closed:
            self._behind.wait()
            self._behind.clear()
            try:
                with self._lock:
                    if self._offer is not None and not self._is_closed():
                        self._bring_up(self._offer)
            except (RayError, LearnerError, WeightsError, TimeoutError) as error:
                logger.warning("replicas could not catch up, which is tried again: %s", error)
            except Exception as error:  # nobody waits for this thread
                logger.exception("replicas catch up no more")
                self._health.failed(error)
                return
            time.sleep(_CATCH_UP_EVERY_S)

    def _is_closed(self) -> bool:
        return self._closed

    def _bring_up(self, offer: VersionOffer) -> None:
        with self._replicas.book() as book:
            behind = {state.replica for state in book.behind()}
        if not behind:
            return
        self._ensure_stores()
        # Where a store was lost, the version is written anew, if the learners have it still.
        self._update(self._offer or offer, behind)

    def _calls(self) -> int:
        return self._replicas.calls + (self._stores.calls if self._stores is not None else 0)


def _latest(before: Applied | None, now: Applied) -> Applied:
    """One that had taken it at the first offer has nothing to say at the second."""
    return before if before is not None and not before.problem else now
