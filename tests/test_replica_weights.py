"""How a replica comes to new weights: from memory that its node shares, verified before the engine is touched."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from raygym.delta_sending import apply_to_copy, encode_in_place
from raygym.engine import EngineError
from raygym.in_flight import InFlight
from raygym.replica_weights import ReplicaWeights
from raygym.simulate import SimulatedConfig, SimulatedEngine
from raygym.version_file import changed_tensors, file_checksums, file_shapes
from raygym.weight_checksums import model_checksum, tensor_checksum
from raygym.weight_slots import OpenSlots, WeightSlots
from raygym.weights import (
    Manifest,
    VersionOffer,
    WeightsError,
    WeightsId,
    plan_manifest,
    safetensors_header,
)

SHAPES = [("a", (3, 4)), ("b", (7,)), ("c", (5, 2))]


def written(slots: Any, manifest: Manifest, slot: int, seed: int) -> dict[str, int]:
    """Fill a slot with random weights; their checksums."""
    rng = np.random.default_rng(seed)
    checksums = {}
    data = slots.data(slot)
    for tensor in manifest.tensors:
        value = rng.standard_normal(tensor.shape).astype(np.float32).tobytes()
        data[tensor.start : tensor.end] = value
        checksums[tensor.name] = tensor_checksum(value)
    return checksums


@pytest.fixture
def manifest() -> Manifest:
    return plan_manifest(SHAPES, "float32", 64)


@pytest.fixture
def slots(manifest: Manifest) -> Any:
    owner = WeightSlots(safetensors_header(manifest), manifest.nbytes)
    yield owner
    owner.close()


def test_what_one_process_writes_another_reads_as_safetensors(slots: WeightSlots, manifest: Manifest) -> None:
    sent = written(OpenSlots(slots.paths, slots.base), manifest, 1, seed=0)
    assert file_checksums(slots.paths[1]) == sent
    assert file_shapes(slots.paths[1]) == dict(SHAPES)
    for name, tensor in load_file(slots.paths[1]).items():
        assert tensor_checksum(tensor.numpy()) == sent[name]
    assert changed_tensors(slots.paths[1], sent) == []
    slots.data(1)[manifest.tensors[1].start] ^= 1
    assert changed_tensors(slots.paths[1], sent) == ["b"]
    assert changed_tensors(slots.paths[0], sent) == ["a", "b", "c"], "the other slot is another version"


def status_of(descriptor: Path) -> os.stat_result | None:
    try:
        return descriptor.stat()
    except OSError:  # the one that lists the folder
        return None


def test_the_memory_is_gone_with_its_owner(manifest: Manifest) -> None:
    slots = WeightSlots(safetensors_header(manifest), manifest.nbytes)
    paths, base = slots.paths, slots.base
    memory = [os.stat(path) for path in paths]
    assert [os.stat(path).st_blocks > 0 for path in paths] == [True, True]
    slots.close()
    del slots
    gc.collect()
    # By what they are, since a number may be another file's by now.
    left = {(status.st_dev, status.st_ino) for status in map(status_of, Path("/proc/self/fd").iterdir()) if status}
    assert left.isdisjoint((status.st_dev, status.st_ino) for status in memory)
    with pytest.raises(WeightsError, match="weight store of this node is gone"):
        OpenSlots(paths, base)
    with pytest.raises(WeightsError, match="whoever has written it is gone"):
        file_checksums(paths[0])


def test_too_little_memory_is_told_before_anything_is_reserved() -> None:
    with pytest.raises(WeightsError, match=r"two versions of the weights take \d+ MiB .* MiB are free"):
        WeightSlots(b"", psutil.virtual_memory().total)


class Replica:
    def __init__(self, model_dir: Path, leased: bool = False) -> None:
        self.engine = SimulatedEngine(SimulatedConfig(), [2])
        self.fenced = 0
        self.weights = ReplicaWeights(
            "r", "node", self.engine, InFlight(), str(model_dir), leased=leased, fenced=self._fenced
        )

    def _fenced(self) -> None:
        self.fenced += 1

    async def update(self, offer: VersionOffer) -> Any:
        return await self.weights.update(offer, "keep", 1.0, load_timeout_s=60.0)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in SHAPES}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def offer_of(slots: WeightSlots, manifest: Manifest, version: int, slot: int = 0) -> VersionOffer:
    sent = written(slots, manifest, slot, seed=version)
    return VersionOffer(WeightsId(version, model_checksum(sent)), {"node": slots.paths[slot]}, sent)


async def test_a_version_is_applied_once(slots: WeightSlots, manifest: Manifest, model_dir: Path) -> None:
    replica = Replica(model_dir)
    offer = offer_of(slots, manifest, 3)
    first, second = await asyncio.gather(replica.update(offer), replica.update(offer))
    assert first.state.weights == second.state.weights == offer.weights
    assert not first.problem and not second.problem
    assert set(first.seconds) == {"verify", "load"} and not second.seconds, "there was nothing left to do"
    assert (replica.engine.weight_version, replica.fenced) == (3, 0)


async def test_changed_weights_are_refused_and_may_come_again(
    slots: WeightSlots, manifest: Manifest, model_dir: Path
) -> None:
    replica = Replica(model_dir)
    offer = offer_of(slots, manifest, 1)
    place = manifest.tensors[2].start
    slots.data(0)[place] ^= 0x10
    refused = await replica.update(offer)
    assert refused.changed == ("c",) and "1 tensors had changed" in refused.problem
    assert refused.state.weights == WeightsId() and replica.fenced == 0, "it goes on with what it has"
    slots.data(0)[place] ^= 0x10
    assert (await replica.update(offer)).state.weights == offer.weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"paths": {}}, "version 1 is not on node node yet"),
        ({"paths": {"node": f"/proc/{os.getpid()}/fd/99999"}}, "No such file"),
    ],
)
async def test_a_version_that_cannot_be_had_changes_nothing(
    slots: WeightSlots, manifest: Manifest, model_dir: Path, change: dict[str, Any], words: str
) -> None:
    replica = Replica(model_dir)
    offer = offer_of(slots, manifest, 1)
    broken = VersionOffer(offer.weights, change["paths"], offer.checksums)
    refused = await replica.update(broken)
    assert words in refused.problem
    assert refused.state.admitted and replica.fenced == 0, "whether it may go on is for the driver to say"
    assert replica.weights.failure is None, "the engine is as it was"
    assert not (await replica.update(offer)).problem, "and takes the version when it is there"


async def test_a_store_that_is_lost_once_the_version_is_verified_costs_nothing(
    manifest: Manifest, model_dir: Path
) -> None:
    replica, store = Replica(model_dir), WeightSlots(safetensors_header(manifest), manifest.nbytes)
    offer = offer_of(store, manifest, 1)
    pause = replica.engine.pause

    async def lose() -> None:
        store.close()
        await pause()

    replica.engine.pause = lose  # type: ignore[method-assign]
    applied = await replica.update(offer)
    assert (applied.problem, applied.state.weights) == ("", offer.weights)
    assert "gone" in (await Replica(model_dir).update(offer)).problem


async def test_weights_of_another_model_are_refused(slots: WeightSlots, manifest: Manifest, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    replica = Replica(tmp_path)
    assert "another shape for b" in replica.weights.misfit({"a": (3, 4), "b": (7,)})
    refused = await replica.update(offer_of(slots, manifest, 1))
    assert "have unknown c" in refused.problem and replica.engine.weight_version == 0


async def test_an_engine_that_fails_while_it_loads_is_unusable(
    slots: WeightSlots, manifest: Manifest, model_dir: Path
) -> None:
    replica = Replica(model_dir)

    async def load_weights(path: str, version: int) -> str:
        replica.engine.weight_version = version
        return "something else"

    replica.engine.load_weights = load_weights  # type: ignore[method-assign]
    refused = await replica.update(offer_of(slots, manifest, 1))
    assert "the engine loaded something else" in refused.problem
    assert isinstance(replica.weights.failure, WeightsError)
    assert refused.state.fenced and not refused.state.admitted and replica.fenced == 1
    assert refused.state.broken.startswith("WeightsError: the engine loaded something else")
    again = await replica.update(offer_of(slots, manifest, 2))
    assert "waits to be replaced: WeightsError: the engine loaded something else" in again.problem


async def test_a_dead_engine_is_told_with_its_reason(model_dir: Path) -> None:
    replica = Replica(model_dir)
    assert replica.weights.state().broken == ""
    replica.weights.fail(EngineError("it died\n of this"))
    replica.weights.fail(EngineError("and of that"))
    state = replica.weights.state()
    assert (state.broken, state.admitted, state.fenced) == ("EngineError: it died of this", False, True)
    assert replica.fenced == 1, "what is in hand ended once"


async def test_an_engine_that_hangs_while_it_loads_is_given_up(
    slots: WeightSlots, manifest: Manifest, model_dir: Path
) -> None:
    replica = Replica(model_dir)

    async def load_weights(path: str, version: int) -> str:
        await asyncio.Event().wait()
        return ""

    replica.engine.load_weights = load_weights  # type: ignore[method-assign]
    offer = offer_of(slots, manifest, 1)
    refused = await replica.weights.update(offer, "restart_turn", 1.0, load_timeout_s=0.05)
    assert "did not load version 1 within 0.05 s" in refused.problem and refused.state.fenced
    with pytest.raises(EngineError, match="unusable"):
        await replica.weights._in_flight.run(lambda: asyncio.sleep(0))


def test_a_delta_leaves_the_sender_with_what_the_receivers_have() -> None:
    held, new = np.asarray([0.0, 1.0, 2.0], np.float32), np.asarray([-0.0, 1.0005, 3.0], np.float32)
    receiver = np.empty_like(held)
    encoded = encode_in_place(held.data.cast("B"), new.data.cast("B"), "float32", 0.01)
    apply_to_copy(encoded.data, held.data.cast("B"), receiver.data.cast("B"), "float32")
    assert receiver.tobytes() == new.tobytes() and new[2] == 3.0
    zeros = np.asarray([-0.0, 1.0, 2.0], np.float32)
    encode_in_place(held.data.cast("B"), zeros.data.cast("B"), "float32", 0.01)
    assert zeros.tobytes() == held.tobytes(), "also where only the sign of a zero is left out"
