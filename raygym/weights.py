"""One version of a policy's weights as bytes: the manifest and its buckets.

A version is laid out as one safetensors file: an 8-byte length, a JSON header, then the tensors without gaps.
Learner 0 writes the data part bucket by bucket to its place in such a file in the shared memory of its node, and sends
it to the other nodes' files; so the whole version is there, checked, before a single parameter of an engine changes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from safetensors import safe_open

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Shapes = Sequence[tuple[str, tuple[int, ...]]]


class WeightsError(RuntimeError):
    """Weights that must not be served: a name, a shape or a checksum is not what was expected."""


class CollectiveTimeout(TimeoutError):
    """A member of the weight group did not show up or did not take part in time."""


@dataclass(frozen=True, slots=True)
class WeightsId:
    """Which weights: the number of a version may be given twice, where a run went back to a checkpoint."""

    version: int = 0
    checksum: str = ""
    """`weight_checksums.model_checksum`; empty for the files that the engines were started from."""


@dataclass(frozen=True, slots=True)
class Sending:
    """How learner 0 sends."""

    updates: int | None = None
    """That the weights must have seen; None: any number."""
    threshold: float | None = None
    """What changed by at most this against the other slot stays as it is there; None: nothing does."""
    whole: bool = False
    """With a threshold: buckets travel whole all the same, to whoever has lost what he held."""

    @property
    def delta(self) -> bool:
        """Buckets travel as what changed."""
        return self.threshold is not None and not self.whole


@dataclass(frozen=True, slots=True)
class VersionOffer:
    """A version that is whole in the memory of each node, for its replicas to take."""

    weights: WeightsId
    paths: Mapping[str, str]
    """Ray's ID of a node -> the safetensors file of the version there."""
    checksums: Mapping[str, int]
    """Of each tensor, as sent."""


@dataclass(frozen=True, slots=True)
class Published:
    """One version that every replica serves, except those that were fenced."""

    version: int
    checksum: str
    nbytes: int
    """Bytes of one version."""
    broadcast_s: float
    """Until it was whole in the memory of each node."""
    apply_s: float
    """From then until each replica served it; waiting for turns included."""
    turns_restarted: int = 0
    turns_late: int = 0
    """Over all replicas, as in `replica_weights.Applied`."""
    replicas: int = 0
    """That serve it."""
    fenced: int = 0
    """Replicas that did not come so far; they take no turns until they have."""
    resent_buckets: int = 0
    """That had arrived changed."""
    control_calls: int = 0
    """Remote calls of the driver."""
    sent_nbytes: int = 0
    """To each other node, or what would be sent to one; less than `nbytes` with `sync.mode: delta`."""
    sent_share: float = 1.0
    """Of the weights."""
    largest_error: float = 0.0
    """The most that a served weight differs from the learners', with `sync.delta.threshold` above 0."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Parts of the two above: of learner 0 `gather`, `write`, `encode`, `broadcast`; of the slowest replica
    `verify`, `load`."""


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


def check_shapes(
    sent: Mapping[str, tuple[int, ...]], checkpoint: Mapping[str, tuple[int, ...]], tied: Iterable[str] = ()
) -> None:
    """Refuse a version that would not replace exactly what the engine loaded at its start.

    Args:
        sent: name -> shape of what the learner sends.
        checkpoint: name -> shape of the tensors that the engine was started from.
        tied: names that share another tensor's storage, which a learner sends once.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape. A missing shard of a fused layer would
            otherwise corrupt the engine silently.
    """
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


def buckets_of(manifest: Manifest, names: Collection[str]) -> list[int]:
    """Numbers of the buckets that these tensors are in."""
    wanted = set(names)
    return [
        number
        for number, bucket in enumerate(manifest.buckets)
        if any(tensor.name in wanted for tensor in bucket.tensors)
    ]


def checkpoint_shapes(model_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint's safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        # No tensor is read, so any type will do; "pt" would import PyTorch.
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def tied_names(model_dir: str | Path) -> tuple[str, ...]:
    """Names that a checkpoint may repeat although they share another tensor's storage."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    return ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
