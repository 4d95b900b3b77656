"""Learner 0's side of an update, without a cluster: what is in the slot, and what the other ranks take part in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from raygym.actors import weight_sender
from raygym.actors.weight_sender import WeightSender
from raygym.version_file import file_checksums
from raygym.weight_slots import OpenSlots, WeightSlots
from raygym.weights import CollectiveTimeout, Manifest, Sending, plan_manifest, safetensors_header

pytestmark = [pytest.mark.ray]


class Learner:
    """Weights that change, and the names that were gathered."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(50, generator=generator) for name in "abcd"}
        self.gathered: list[str] = []

    def iter_weights(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            self.gathered.append(name)
            yield name, self.weights[name]

    def learn(self, size: float) -> None:
        for weight in self.weights.values():
            weight += size * torch.arange(50)


@pytest.fixture
def manifest() -> Manifest:
    return plan_manifest([(name, (50,)) for name in "abcd"], "float32", 200)


@pytest.fixture
def slots(manifest: Manifest) -> Iterator[WeightSlots]:
    owner = WeightSlots(safetensors_header(manifest), manifest.nbytes)
    yield owner
    owner.close()


def sender_of(slots: WeightSlots) -> WeightSender:
    return WeightSender(OpenSlots(slots.paths, slots.base))


def test_the_slot_holds_what_is_told_and_bf16_is_made_on_the_way(slots: WeightSlots, manifest: Manifest) -> None:
    learner = Learner()
    sent = sender_of(slots).send(manifest, learner.iter_weights, 1, range(4), 10)
    assert sent.checksums == file_checksums(slots.paths[1])
    assert learner.gathered == list("abcd") and {"gather", "write"} <= set(sent.seconds)
    small = plan_manifest([(name, (50,)) for name in "abcd"], "bfloat16", 200)
    owner = WeightSlots(safetensors_header(small), small.nbytes)
    sender_of(owner).send(small, learner.iter_weights, 0, range(2), 10)
    first = torch.frombuffer(owner.data(0), dtype=torch.bfloat16)[:50]
    assert torch.equal(first, learner.weights["a"].bfloat16())
    del first
    owner.close()


@pytest.mark.parametrize("threshold", [0.0, 0.02])
def test_what_is_sent_again_is_what_was_sent(threshold: float, slots: WeightSlots, manifest: Manifest) -> None:
    learner, sender = Learner(), sender_of(slots)
    sender.send(manifest, learner.iter_weights, 0, range(4), 10)
    learner.learn(0.001)
    sent = sender.send(manifest, learner.iter_weights, 1, range(4), 10, Sending(threshold=threshold))
    summary = sent.summary()
    assert summary is not None and summary.largest_error <= threshold
    assert sent.checksums == file_checksums(slots.paths[1])
    assert (summary.sent_share < 1) == bool(threshold)
    slots.data(1)[manifest.buckets[2].start] ^= 1
    assert file_checksums(slots.paths[1]) != sent.checksums
    again = sender.send(manifest, learner.iter_weights, 1, [2], 10, Sending(threshold=threshold, whole=True))
    assert {**sent.checksums, **again.checksums} == sent.checksums == file_checksums(slots.paths[1])


def test_all_buckets_are_gathered_whatever_fails(
    slots: WeightSlots, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, sender = Learner(), sender_of(slots)
    sender._group_name = "gone"

    def broadcast_bytes(buffer: Any, group_name: str) -> None:
        raise CollectiveTimeout("a store is gone")

    monkeypatch.setattr(weight_sender, "broadcast_bytes", broadcast_bytes)
    with pytest.raises(CollectiveTimeout, match="a store is gone"):
        sender.send(manifest, learner.iter_weights, 0, range(4), 10)
    assert learner.gathered == list("abcd"), "other ranks gather all of them, too"


def test_all_buckets_are_gathered_where_one_cannot_be_written(slots: WeightSlots, manifest: Manifest) -> None:
    learner = Learner()
    learner.weights["b"] = torch.zeros(49)
    with pytest.raises(AssertionError):
        sender_of(slots).send(manifest, learner.iter_weights, 0, range(4), 10)
    assert learner.gathered == list("abcd"), "other ranks gather all of them, too"


def test_numbers_are_what_they_were(slots: WeightSlots, manifest: Manifest) -> None:
    learner = Learner()
    sender_of(slots).send(manifest, learner.iter_weights, 0, range(4), 10)
    whole = np.frombuffer(slots.data(0), np.float32)
    assert np.array_equal(whole, torch.cat([learner.weights[name] for name in "abcd"]).numpy())
