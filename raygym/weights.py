"""One version of a policy's weights as bytes: the manifest, its buckets, and checksums.

A version is laid out as one safetensors file: an 8-byte length, a JSON header, then the tensors without gaps.
The learner broadcasts the data part bucket by bucket; an engine receives each bucket at its place in such a file
in shared memory, so the whole version is there, checked, before a single parameter of the engine changes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Shapes = Sequence[tuple[str, tuple[int, ...]]]


class WeightsError(RuntimeError):
    """Weights that must not be served: a name, a shape or a checksum is not what was expected."""


@dataclass(frozen=True, slots=True)
class Published:
    """One version that every replica serves."""

    version: int
    checksum: str
    nbytes: int
    """Bytes of one version, as sent to each replica."""
    broadcast_s: float
    apply_s: float
    """Waiting for turns included."""
    turns_restarted: int = 0
    turns_late: int = 0
    """Over all replicas, as in `policy_server.Applied`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor and its place in the data part."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First byte."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of whole tensors that travels in one broadcast: a tensor is never split."""

    start: int
    end: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What every version of one policy consists of. The buckets cover the data part in order, without gaps."""

    dtype: str
    buckets: tuple[Bucket, ...]

    @property
    def tensors(self) -> list[TensorSpec]:
        """All tensors, in the order in which they travel."""
        return [tensor for bucket in self.buckets for tensor in bucket.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of one version."""
        return self.buckets[-1].end if self.buckets else 0


def plan_manifest(shapes: Shapes, dtype: str, bucket_bytes: int) -> Manifest:
    """Place the tensors one after the other and cut them into buckets of at most `bucket_bytes`.

    A tensor larger than a bucket gets one for itself. Tensors of one layer may fall into two buckets: that is
    safe, since engines apply a version only as a whole.
    """
    buckets: list[Bucket] = []
    pending: list[TensorSpec] = []
    offset = 0
    for name, shape in shapes:
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        if pending and offset + nbytes - pending[0].start > bucket_bytes:
            buckets.append(Bucket(pending[0].start, offset, tuple(pending)))
            pending = []
        pending.append(TensorSpec(name, tuple(shape), offset, offset + nbytes))
        offset += nbytes
    if pending:
        buckets.append(Bucket(pending[0].start, offset, tuple(pending)))
    return Manifest(dtype, tuple(buckets))


def safetensors_header(manifest: Manifest) -> bytes:
    """The length prefix and JSON header of the version's file, padded to 8 bytes as the format asks."""
    entries = {
        tensor.name: {
            "dtype": SAFETENSORS_DTYPE[manifest.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
        for tensor in manifest.tensors
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_checksum(data: Any) -> int:
    """CRC-32 of one tensor's bytes (any C-contiguous buffer)."""
    return zlib.crc32(data)


def model_checksum(tensors: Mapping[str, int]) -> str:
    """One digest of a whole version from its tensors' checksums; independent of the order of the tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name]:08x};".encode())
    return digest.hexdigest()


def check_shapes(manifest: Manifest, checkpoint: Mapping[str, tuple[int, ...]], tied: Iterable[str] = ()) -> None:
    """Refuse a manifest that would not replace exactly what the engine loaded at its start.

    Args:
        manifest: what the learner will send.
        checkpoint: name -> shape of the tensors that the engine was started from.
        tied: names that share another tensor's storage, which a learner sends once.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape. A missing shard of a fused layer would
            otherwise corrupt the engine silently.
    """
    sent = {tensor.name: tensor.shape for tensor in manifest.tensors}
    missing = sorted(set(checkpoint) - set(sent) - set(tied))
    unknown = sorted(set(sent) - set(checkpoint))
    reshaped = sorted(name for name in set(sent) & set(checkpoint) if tuple(checkpoint[name]) != tuple(sent[name]))
    for found, what in ((missing, "lack"), (unknown, "have unknown"), (reshaped, "have another shape for")):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise WeightsError(
                f"the learner's weights {what} {', '.join(found[:3])}{more} compared with the checkpoint that the "
                f"engine was started from; both must be started from the same policy.model"
            )


def compare_checksums(sent: Mapping[str, int], received: Mapping[str, int], who: str) -> None:
    """Raises WeightsError naming the first tensor that arrived changed at `who`."""
    for name, checksum in sent.items():
        if received.get(name) != checksum:
            raise WeightsError(f"{who}: tensor {name} arrived changed (checksum {received.get(name)} != {checksum})")


def checkpoint_shapes(model_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint's safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def tied_names(model_dir: str | Path) -> tuple[str, ...]:
    """Names that a checkpoint may repeat although they share another tensor's storage."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    return ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
