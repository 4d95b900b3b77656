"""Learner 0's side of a weight update: gather, write into shared memory, checksum, broadcast, bucket by bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from raygym.actors.collective import broadcast_bytes, join_group, leave_group
from raygym.delta_sending import encode_in_place
from raygym.sent_version import SentVersion
from raygym.testing import chaos
from raygym.weight_checksums import Bytes, SummedCopy, sum_up
from raygym.weight_slots import OpenSlots
from raygym.weights import Bucket, CollectiveTimeout, Manifest, Sending, TensorSpec

IterWeights = Callable[[list[str]], Iterator[tuple[str, torch.Tensor]]]
"""Names of one bucket -> (name, whole tensor), valid until all were asked for; under ZeRO-3 every rank must iterate it.
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_WHOLE = Sending()


class WeightSender:
    """Learner 0's, with the slots of its node."""

    def __init__(self, slots: OpenSlots) -> None:
        """A member of no group."""
        self.slots: OpenSlots | None = slots
        self._group_name = ""

    def join(self, group_name: str, world_size: int, timeout_s: float) -> None:
        """Become the sender of a group of stores, in place of any other; an empty name only leaves that.

        Raises:
            CollectiveTimeout: somebody is missing after `timeout_s`.
        """
        leave_group(self._group_name)
        self._group_name = ""
        if group_name:
            join_group(group_name, 0, world_size, timeout_s)
            self._group_name = group_name

    def send(
        self,
        manifest: Manifest,
        iter_weights: IterWeights,
        slot: int,
        buckets: Sequence[int],
        timeout_s: float,
        sending: Sending = _WHOLE,
    ) -> SentVersion:
        """Write the buckets of one version into `slot`, and send them to the other nodes' stores.

        The next bucket is gathered and written while the last one is sent. All are gathered, whatever
        fails: the other ranks take part in that.

        Args:
            manifest: what a version consists of.
            iter_weights: how to get at the weights.
            slot: which; the other one holds the current version.
            buckets: numbers of those that are sent.
            timeout_s: of all together.
            sending: what of them travels.

        Raises:
            CollectiveTimeout: a store is gone or late; all together may take `timeout_s`.
        """
        assert self.slots is not None, "open_slots() first"
        sent, deadline = SentVersion(), time.monotonic() + timeout_s
        data = torch.frombuffer(self.slots.data(slot), dtype=torch.uint8)
        with ThreadPoolExecutor(1) as broadcasting:
            waiting: list[Future[None]] = []
            failure: Exception | None = None
            for number in buckets:
                bucket = manifest.buckets[number]
                if failure is not None or any(future.done() and future.exception() for future in waiting):
                    take_part(manifest, iter_weights, [number])
                    continue
                try:
                    payload = self._prepare(data, manifest.dtype, slot, bucket, iter_weights, sending, sent)
                except Exception as error:
                    failure = error
                    continue
                if self._group_name:
                    waiting.append(broadcasting.submit(self._broadcast, payload, sent, deadline))
            if failure is not None:
                raise failure
            for future in waiting:
                future.result()
        return sent

    def _prepare(
        self,
        data: torch.Tensor,
        dtype: str,
        slot: int,
        bucket: Bucket,
        iter_weights: IterWeights,
        sending: Sending,
        sent: SentVersion,
    ) -> list[torch.Tensor]:
        """Write a bucket; what of it is to travel."""
        assert self.slots is not None
        self._write(data, dtype, bucket, iter_weights, sent)
        payload = [data[bucket.start : bucket.end]]
        if sending.threshold is not None:
            message = self._encode(self.slots, dtype, slot, bucket, sending.threshold, sent)
            payload = message if sending.delta else payload
            if sending.threshold:
                with sent.timed("write"):  # anew, since small changes were taken back
                    sent.checksums |= sum_up(SummedCopy(each.name, _bytes(data, each)) for each in bucket.tensors)
        chaos.at("sync.bucket", data=data[bucket.start : bucket.end].numpy().data)
        return payload

    @staticmethod
    def _write(data: torch.Tensor, dtype: str, bucket: Bucket, iter_weights: IterWeights, sent: SentVersion) -> None:
        with sent.timed("gather"):
            weights = iter_weights([tensor.name for tensor in bucket.tensors])
            first = next(weights)  # under ZeRO-3 all of the bucket come with it
        with sent.timed("write"):
            sums = []
            for spec in bucket.tensors:
                name, weight = first if spec is bucket.tensors[0] else next(weights)
                assert name == spec.name and tuple(weight.shape) == spec.shape, (name, spec)
                source = _plain_bytes(weight, DTYPES[dtype])
                if source is None:
                    # Converts and, from a GPU, copies in the same pass.
                    data[spec.start : spec.end].view(DTYPES[dtype]).view(spec.shape).copy_(weight)
                sums.append(SummedCopy(name, _bytes(data, spec), source))
            sent.checksums |= sum_up(sums)
        assert next(weights, None) is None, bucket  # gives back what was gathered

    @staticmethod
    def _encode(
        slots: OpenSlots, dtype: str, slot: int, bucket: Bucket, threshold: float, sent: SentVersion
    ) -> list[torch.Tensor]:
        """The length of the message, and the message."""
        with sent.timed("encode"):
            held, new = (slots.data(which)[bucket.start : bucket.end] for which in (1 - slot, slot))
            encoded = encode_in_place(held, new, dtype, threshold)
            sent.delta.append(replace(encoded, data=b""))
            sent.sent_nbytes += len(encoded.data)
            message = torch.frombuffer(bytearray(encoded.data), dtype=torch.uint8)
            return [torch.tensor([len(message)]).view(torch.uint8), message]

    def _broadcast(self, payload: list[torch.Tensor], sent: SentVersion, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise CollectiveTimeout(f"group {self._group_name}: a version was not sent in time")
        with sent.timed("broadcast"):
            for part in payload:
                broadcast_bytes(part, self._group_name)


def take_part(manifest: Manifest, iter_weights: IterWeights, buckets: Sequence[int]) -> None:
    """What the other ranks do meanwhile: they take part in the gathering."""
    for bucket in (manifest.buckets[number] for number in buckets):
        for _ in iter_weights([tensor.name for tensor in bucket.tensors]):
            pass


def _plain_bytes(weight: torch.Tensor, dtype: torch.dtype) -> Bytes | None:
    """A view of the bytes, where they are in this process's memory in the wanted form."""
    if weight.device.type != "cpu" or weight.dtype is not dtype or not weight.is_contiguous():
        return None
    return weight.detach().reshape(-1).view(torch.uint8).numpy()


def _bytes(data: torch.Tensor, tensor: TensorSpec) -> Bytes:
    """Of one tensor in the data part."""
    return data[tensor.start : tensor.end].numpy()
