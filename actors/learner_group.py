"""All learners as one object on the driver. They form a gang: where one is lost, all are started again."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raygym.actors.learner_actor import LearnerActor, ask
from raygym.actors.learner_placement import LearnerPlacement, PlacementError
from raygym.actors.ray_errors import cause
from raygym.config import LearnerConfig
from raygym.errors import LearnerStateError
from raygym.process_end import wait_ended
from raygym.sent_version import SentVersion
from raygym.types import Float32Array, LearnStats, TrainSequence
from raygym.weights import Manifest, Sending

logger = logging.getLogger(__name__)
GANG = "the learner gang"
"""What people are told is lost."""
_CLOSE_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 10.0
_SEND_MARGIN_S = 10.0
# For processes that the driver cannot see: on other nodes, or not set up yet. Ray says that an actor is dead as soon as
# it has told the node to end it.
_UNSEEN_END_S = 1.0
# Of an answer that is there already.
_ANSWER_TIMEOUT_S = 1.0


class LearnerError(RuntimeError):
    """A rank failed or missed its deadline. The text names the rank; the gang has to be started again."""


class LearnerGroup:
    """The gang of `num_learners` ranks. Build it with `launch`, then `wait_ready` before anything else."""

    def __init__(self, actors: list[Any], config: LearnerConfig, placement: LearnerPlacement) -> None:
        self.actors = actors
        self._placement = placement
        self.config = config
        self._launched = time.monotonic()
        # Ray resolves the rendezvous before it calls setup, so the whole start runs without the driver.
        rendezvous = ask(actors[0], "rendezvous")
        self._ready = [ask(actor, "setup", rendezvous) for actor in actors]
        # Ranks must get calls in the same order, also from two threads: in them they wait for each other.
        self._submitting = threading.Lock()
        self._processes: list[tuple[str, int]] = []
        self._pings: list[Any] = []
        self._pinged = 0.0

    @classmethod
    def launch(
        cls, config: LearnerConfig, model_dir: str, temperature: float, total_updates: int | None = None
    ) -> LearnerGroup:
        """Start all ranks and return at once; they load in the background.

        Args:
            config: `learner` of the run.
            model_dir: the policy's files, on every node.
            temperature: of the sampling.
            total_updates: of the whole run; needed where `lr_schedule` falls.
        """
        placement = LearnerPlacement.reserve(config)
        actors = [
            _start_rank(rank, placement, config, model_dir, temperature, total_updates)
            for rank in range(config.num_learners)
        ]
        return cls(actors, config, placement)

    def wait_ready(self) -> None:
        """Block until every rank is set up. The deadline, `startup_timeout_s`, counts from `launch`."""
        deadline = self._launched + self.config.startup_timeout_s
        try:
            self._placement.wait_placed(max(0.0, deadline - time.monotonic()))
        except PlacementError as error:
            raise LearnerError(str(error)) from error
        self._processes = self._collect(self._ready, "setup", max(0.0, deadline - time.monotonic()))

    def settled(self) -> bool:
        """Whether every rank is set up or has failed; `wait_ready` then tells at once."""
        return len(ray.wait(self._ready, num_returns=len(self._ready), timeout=0)[0]) == len(self._ready)

    def update(self, sequences: Sequence[TrainSequence]) -> LearnStats:
        """One step's optimizer updates; see `Learner.update`."""
        stats: LearnStats = self.call_all("update", ray.put(list(sequences)), timeout_s=self.config.update_timeout_s)[0]
        return stats

    def token_logprobs(self, sequences: Sequence[TrainSequence]) -> list[Float32Array]:
        """For each sequence T logprobs under the current weights, 0 where its mask is False."""
        return self._logprobs("token_logprobs", sequences)

    def learned_logprobs(self) -> dict[int, Float32Array]:
        """What the last update computed anyway, by sequence; see `PolicyUpdate.learned_logprobs`."""
        shares = self.call_all("learned_logprobs", timeout_s=self.config.update_timeout_s)
        return {index: logprobs for share in shares for index, logprobs in share.items()}

    def reference_logprobs(self, sequences: Sequence[TrainSequence]) -> list[Float32Array]:
        """The same under the starting policy, which is there where `kl_coef` is above 0."""
        return self._logprobs("reference_logprobs", sequences)

    def _logprobs(self, method: str, sequences: Sequence[TrainSequence]) -> list[Float32Array]:
        shares = self.call_all(method, ray.put(list(sequences)), timeout_s=self.config.update_timeout_s)
        found = {index: logprobs for share in shares for index, logprobs in share.items()}
        return [found[index] for index in range(len(sequences))]

    def save_hf(self, path: str) -> None:
        """Write the current policy as a Hugging Face directory."""
        self.call_all("save_hf", path, timeout_s=self.config.update_timeout_s)

    def save_state(self, path: str) -> None:
        """Write what is needed to go on, to a folder that rank 0's node reaches; see `Learner.save_state`."""
        self.call_all("save_state", path, timeout_s=self.config.update_timeout_s)

    def load_state(self, path: str) -> None:
        """Go on from there; the number of ranks and the ZeRO stage may be others.

        Raises:
            LearnerStateError: it is not one of this policy; another gang could not load it either.
        """
        self.call_all("load_state", path, timeout_s=self.config.update_timeout_s)

    @property
    def weight_ranks(self) -> int:
        """Ranks that have to take part when weights are published."""
        return self.config.num_learners if self.config.zero_stage == 3 else 1

    def publish_weights(
        self,
        manifest: Manifest,
        slot: int,
        buckets: Sequence[int],
        sending: Sending,
        timeout_s: float,
    ) -> SentVersion:
        """Rank 0 sends buckets of the current weights; see `Learner.publish_weights`."""
        arguments = (manifest, slot, buckets, sending, timeout_s)
        calls = self._submit("publish_weights", arguments, self.weight_ranks)
        # Rank 0 finds out first who was late: only its own error tells that it was no learner.
        sent: SentVersion = self._collect(calls, "publish_weights", 2 * timeout_s + _SEND_MARGIN_S)[0]
        return sent

    def call_first(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method on rank 0 only. Raises as `call_all` does."""
        return self._collect([ask(self.actors[0], method, *args)], method, timeout_s)[0]

    def check_alive(self) -> None:
        """Find out, without waiting, whether a rank was lost while nothing was asked of it. Call it now and then.

        Raises:
            LearnerError: a rank has died, or has not answered for `update_timeout_s`.
        """
        now = time.monotonic()
        answered = ray.wait(self._pings, num_returns=len(self._pings), timeout=0)[0] if self._pings else []
        for rank, ping in enumerate(self._pings):
            if ping in answered:
                self._answer(rank, ping, "ping", _ANSWER_TIMEOUT_S)
        if len(answered) == len(self._pings):
            self._pings, self._pinged = [ask(actor, "ping") for actor in self.actors], now
        elif now - self._pinged > self.config.update_timeout_s:
            ranks = [rank for rank, ping in enumerate(self._pings) if ping not in answered]
            raise self._missed(ranks, "ping", self.config.update_timeout_s)

    def call_all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call a method on every rank at once; the results, in order of rank.

        Raises:
            LearnerError: a rank raised, died, or was not done after `timeout_s`.
        """
        return self._collect(self._submit(method, args, len(self.actors)), method, timeout_s)

    def _submit(self, method: str, args: tuple[Any, ...], ranks: int) -> list[Any]:
        with self._submitting:
            return [ask(actor, method, *args) for actor in self.actors[:ranks]]

    def _collect(self, references: list[Any], method: str, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        waiting = {reference: rank for rank, reference in enumerate(references)}
        answers: dict[int, Any] = {}
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            # One at a time as they finish: the rank that failed is reported, not one that waits for it.
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not done:
                raise self._missed(sorted(waiting.values()), method, timeout_s)
            rank = waiting.pop(done[0])
            answers[rank] = self._answer(rank, done[0], method, max(_ANSWER_TIMEOUT_S, left))
        return [answers[rank] for rank in range(len(references))]

    def _answer(self, rank: int, reference: Any, method: str, timeout_s: float) -> Any:
        """What a rank that is done has answered."""
        try:
            return ray.get(reference, timeout=timeout_s)
        except (GetTimeoutError, RayError) as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, LearnerStateError):
                raise LearnerStateError(str(error.cause)) from error
            ranks = len(self.actors)
            raise LearnerError(f"learner rank {rank} of {ranks} failed in {method}: {cause(error)}") from error

    def _missed(self, ranks: list[int], method: str, timeout_s: float) -> LearnerError:
        which = f"{', '.join(str(rank) for rank in ranks)} of {len(self.actors)}"
        return LearnerError(f"learner rank {which} did not finish {method} within {timeout_s:.0f} s")

    def shutdown(self) -> None:
        """Let the ranks leave their process group, then end their processes, those that hang too."""
        closing = [ask(actor, "close") for actor in self.actors]
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        for actor in self.actors:
            ray.kill(actor)
        self._placement.release()

    def kill(self) -> None:
        """End the processes of a gang that is lost, without a word to those that are left. They have ended, or the
        system does not let them, when this returns."""
        for actor in self.actors:
            ray.kill(actor)
        last = [ask(actor, "ping") for actor in self.actors]
        ray.wait(last, num_returns=len(last), timeout=_KILL_TIMEOUT_S)
        here = ray.get_runtime_context().get_node_id()
        seen = [pid for node, pid in self._processes if node == here]
        if not wait_ended(seen, _KILL_TIMEOUT_S):
            logger.warning("processes of learners have not ended: one of %s", seen)
        if len(seen) < len(self.actors):
            time.sleep(_UNSEEN_END_S)
        self._placement.release()


_COPIES_PAST_CACHES = "glibc.cpu.x86_non_temporal_threshold"


def rank_environment(config: LearnerConfig, cores: int) -> dict[str, str]:
    """Environment variables of a rank's process.

    Args:
        config: `learner` of the run.
        cores: of the driver's machine. They say nothing of the nodes of learners on GPUs, so Ray decides there.
    """
    threads = config.threads
    if not threads and not config.gpus_per_learner:
        threads = max(1, cores // config.num_learners)
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    if config.gpus_per_learner:
        return environment
    # A thread that waits must not spin: with `max_staleness` above 0 an engine wants the core (a step took 2.7 times
    # as long on two cores).
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {**environment, "DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": waiting, "GLIBC_TUNABLES": _tunables()}


def _tunables() -> str:
    """Copies of half a MiB and more go past the caches.

    glibc only does so for those that are larger than the cache of the whole processor, and weights are copied to where
    other processes read them in pieces of a MiB: a sixth of the time of a version.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if _COPIES_PAST_CACHES in given:
        return given
    return ":".join(filter(None, [given, f"{_COPIES_PAST_CACHES}=0x80000"]))


def _start_rank(
    rank: int,
    placement: LearnerPlacement,
    config: LearnerConfig,
    model_dir: str,
    temperature: float,
    total_updates: int | None,
) -> Any:
    options = {
        # No CPU reserved: learners and engines take turns on the same cores, and a small machine has few.
        "num_cpus": 0,
        "runtime_env": {"env_vars": rank_environment(config, os.cpu_count() or 1)},
        "max_restarts": 0,
        **placement.options(rank),
    }
    actor = ray.remote(LearnerActor).options(**options)
    return actor.remote(rank, config.num_learners, model_dir, config, temperature, total_updates)
