"""The weights of one replica: which it serves, whether it may, and how it comes to new ones."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raygym.admission import Admission
from raygym.engine import Engine, EngineError
from raygym.in_flight import InFlight, OnUpdate
from raygym.lease import Beat, Lease, ReplicaState
from raygym.testing import chaos
from raygym.version_file import changed_tensors, file_shapes, held_open
from raygym.weights import VersionOffer, WeightsError, WeightsId, check_shapes, checkpoint_shapes, tied_names


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of one version in one replica."""

    state: ReplicaState
    problem: str = ""
    """Why it does not serve it; empty where it does."""
    changed: tuple[str, ...] = ()
    """Tensors that were not what was sent. Nothing was applied then, and the offer may be made again."""
    turns_restarted: int = 0
    turns_late: int = 0
    """Turns that `finish_turn` waited for in vain."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """In `verify` and `load`; the latter with the waiting for turns."""


class ReplicaWeights:
    """Used from the event loop of the replica."""

    def __init__(
        self,
        replica: str,
        node: str,
        engine: Engine,
        in_flight: InFlight,
        model_dir: str,
        *,
        leased: bool,
        fenced: Callable[[], None],
    ) -> None:
        """The engine holds version 0: the files in `model_dir`.

        Args:
            replica: its name in the application.
            node: Ray's ID of the node that it is on.
            engine: whose weights these are.
            in_flight: its generations.
            model_dir: what the engine was started from.
            leased: it serves only what a driver confirms; without, always.
            fenced: called when what is in hand is not to be waited for any more.
        """
        self._replica = replica
        self._node = node
        self._engine = engine
        self._in_flight = in_flight
        self._model_dir = Path(model_dir)
        self._fenced = fenced
        self._updating = asyncio.Lock()
        self.admission = Admission(replica, Lease(leased))
        self.failure: BaseException | None = None
        """Why the engine is unusable, so that the replica has to be replaced."""

    def fail(self, failure: BaseException) -> None:
        """The engine will never serve again. The driver learns why by the next beat; the first reason is the one."""
        if self.failure is None:
            self.failure = failure
            self.admission.fence()
            self._fenced()

    def state(self) -> ReplicaState:
        """Which weights it serves, and whether it may."""
        weights = WeightsId(self._engine.weight_version, self._engine.weights_checksum)
        admission = self.admission
        clock_s = time.monotonic()
        return ReplicaState(
            self._replica,
            self._node,
            weights,
            clock_s,
            admission.admitted,
            admission.ended_s,
            admission.fenced,
            os.getpid(),
            self._engine.first_token_at,
            "" if self.failure is None else _one_line(self.failure),
        )

    def beat(self, beat: Beat) -> ReplicaState:
        """The driver's confirmation, or its refusal."""
        if self.admission.beat(beat):
            self._fenced()
        return self.state()

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why a version of these tensors would not replace what the engine was started from; empty where it would."""
        try:
            check_shapes(shapes, checkpoint_shapes(self._model_dir), tied_names(self._model_dir))
        except WeightsError as error:
            return str(error)
        return ""

    async def update(
        self, offer: VersionOffer, on_update: OnUpdate, finish_timeout_s: float, load_timeout_s: float
    ) -> Applied:
        """Verify the offered version, then pause, replace all weights, and resume. Nothing to do where it is served.

        Where it cannot be had, the replica goes on with what it has until the driver fences it. An error while the
        engine loads fences it at once and makes it unusable.

        Args:
            offer: the version.
            on_update: what becomes of turns that run; see `raygym.in_flight`.
            finish_timeout_s: see `InFlight.updating`.
            load_timeout_s: of the engine, to pause, load and resume. One that takes longer hangs.
        """
        async with self._updating:
            try:
                return await self._update(offer, on_update, finish_timeout_s, load_timeout_s)
            except Exception as error:
                return Applied(self.state(), f"{type(error).__name__}: {error}")

    async def _update(
        self, offer: VersionOffer, on_update: OnUpdate, finish_timeout_s: float, load_timeout_s: float
    ) -> Applied:
        if self.failure is not None:
            raise EngineError(f"it waits to be replaced: {_one_line(self.failure)}") from self.failure
        if self.state().weights == offer.weights:
            return Applied(self.state())
        path = offer.paths.get(self._node)
        if path is None:
            raise WeightsError(f"version {offer.weights.version} is not on node {self._node} yet")
        started = time.monotonic()
        await asyncio.to_thread(chaos.at, "sync.apply")
        with held_open(path) as held:
            if problem := self.misfit(await asyncio.to_thread(file_shapes, held)):
                raise WeightsError(problem)
            if changed := await asyncio.to_thread(changed_tensors, held, offer.checksums):
                return Applied(self.state(), f"{len(changed)} tensors had changed on their way", tuple(changed))
            verified = time.monotonic()
            async with self._in_flight.updating(on_update, finish_timeout_s) as update:
                await self._load(held, offer.weights, load_timeout_s)
        seconds = {"verify": verified - started, "load": time.monotonic() - verified}
        return Applied(self.state(), turns_restarted=update.restarted, turns_late=update.late, seconds=seconds)

    async def _load(self, path: str, weights: WeightsId, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                await self._engine.pause()
                loaded = await self._engine.load_weights(path, weights.version)
                if loaded != weights.checksum:
                    raise WeightsError(
                        f"the engine loaded {loaded}, but version {weights.version} is {weights.checksum}"
                    )
                await self._engine.resume()
        except BaseException as error:
            late = EngineError(f"the engine did not load version {weights.version} within {timeout_s:g} s")
            failure = late if deadline.expired() else error
            self.fail(failure)
            raise failure from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
