"""Learner rank 0's side of a weight update: gather, checksum, broadcast, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from raygym.actors.collective import broadcast_bytes
from raygym.weights import Bucket, Manifest, tensor_checksum

IterWeights = Callable[[list[str]], Iterator[tuple[str, torch.Tensor]]]
"""Names of one bucket -> (name, whole contiguous CPU tensor); under ZeRO-3 every rank must iterate it."""


def send_version(manifest: Manifest, iter_weights: IterWeights, group_name: str | None) -> dict[str, int]:
    """Broadcast one version.

    Args:
        manifest: the plan that every member shares.
        iter_weights: how this rank gets at whole tensors.
        group_name: the weight group on rank 0; None on other ranks, which only take part in the gathering.

    Returns:
        Each tensor's checksum as sent; empty on ranks other than 0.

    Raises:
        CollectiveTimeout: an engine is gone or late.
    """
    checksums: dict[str, int] = {}
    staging = torch.empty(max(bucket.end - bucket.start for bucket in manifest.buckets), dtype=torch.uint8)
    for bucket in manifest.buckets:
        names = [tensor.name for tensor in bucket.tensors]
        for (name, weight), spec in zip(iter_weights(names), bucket.tensors, strict=True):
            assert name == spec.name and tuple(weight.shape) == spec.shape, (name, spec)
            if group_name is not None:
                target = _slice(staging, bucket, spec.start, spec.end)
                target.copy_(weight.contiguous().view(-1).view(torch.uint8))
                checksums[name] = tensor_checksum(target.numpy())
        if group_name is not None:
            broadcast_bytes(_slice(staging, bucket, bucket.start, bucket.end), group_name)
    return checksums


def _slice(staging: torch.Tensor, bucket: Bucket, start: int, end: int) -> torch.Tensor:
    return staging[start - bucket.start : end - bucket.start]
