"""A bucket of new weights as what differs from the bucket that the receivers hold.

An element is sent if it changed by more than a threshold: its position (`changed_positions.py`, in whichever form is
shorter) and its new value, whole. Where that is not shorter than the bucket, the whole bucket is sent. With a
threshold of 0 each element is sent of which any bit changed, so the receivers hold exactly the new weights, NaN and
-0.0 included. With a larger one each element is off by at most the threshold.

The sender compares with what the receivers hold, never with the last version that it computed. So what was left out
once is still owed the next time, and errors do not add up over versions. The sender comes by it as the receivers do:
it applies what it sends to a copy of its own.

A message is a header, the values, the positions. The header has a checksum of the bucket as it must be afterwards. It
has one of the message, too: a message that is damaged or cut short is refused before anything is changed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from raygym.changed_positions import (
    CHUNK,
    Bytes,
    Mask,
    encode_gaps,
    pack_mask,
    packed_size,
    positions_of_gaps,
    positions_of_mask,
    valid_gaps,
    valid_mask,
)
from raygym.weight_checksums import bytes_checksum
from raygym.weights import ITEM_BYTES, WeightsError

Form = Literal["whole", "mask", "gaps"]
Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their size."""

_FORMS: tuple[Form, ...] = ("whole", "mask", "gaps")
_DTYPES = tuple(ITEM_BYTES)
_BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
_MAGIC = b"rgwd"
_FORMAT = 1
# Magic, format, form, dtype; elements, elements sent, bytes of the body; checksums of the bucket and of the body.
_FIELDS = struct.Struct("<4sBBBxQQQQQ")
_HEADER_CHECKSUM = struct.Struct("<Q")
_HEADER_BYTES = _FIELDS.size + _HEADER_CHECKSUM.size


@dataclass(frozen=True, slots=True)
class EncodedBucket:
    """One bucket on its way."""

    data: bytes
    """The message, for `apply_bucket`."""
    form: Form
    elements: int
    sent: int
    """Elements whose values are in the message."""
    largest_error: float
    """The most that an element which is not sent differs from the new weights."""
    checksum: int
    """`bytes_checksum` of the whole bucket once the message is applied."""
    full_nbytes: int
    """Bytes of the bucket itself."""


@dataclass(frozen=True, slots=True)
class DeltaSummary:
    """What a version's buckets amount to."""

    nbytes: int
    full_nbytes: int
    sent_share: float
    """Of the elements; 0 to 1."""
    largest_error: float


def summarize(buckets: Iterable[EncodedBucket]) -> DeltaSummary:
    """Add up the buckets of one version."""
    buckets = list(buckets)
    elements = sum(bucket.elements for bucket in buckets)
    return DeltaSummary(
        nbytes=sum(len(bucket.data) for bucket in buckets),
        full_nbytes=sum(bucket.full_nbytes for bucket in buckets),
        sent_share=sum(bucket.sent for bucket in buckets) / elements if elements else 0.0,
        largest_error=max((bucket.largest_error for bucket in buckets), default=0.0),
    )


def encode_bucket(held: memoryview, new: memoryview, dtype: str, threshold: float) -> EncodedBucket:
    """What to send to receivers that hold `held`, so that they hold `new` to within `threshold`.

    Args:
        held: the bucket's bytes as the receivers have them.
        new: its bytes in the new version.
        dtype: of its elements: `float32`, `bfloat16` or `float16`.
        threshold: changes up to this size are not sent, absolute; 0 sends whatever is not equal bit by bit. A change
            from or to NaN is always sent.

    Raises:
        WeightsError: the buckets are not of one size, or not of whole elements.
        ValueError: the threshold is negative or not finite.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold {threshold}: expected a finite number, 0 or above")
    old_bits, new_bits = _bits(held, dtype), _bits(new, dtype)
    if len(old_bits) != len(new_bits):
        raise WeightsError(f"a bucket of {new.nbytes} bytes cannot be compared with one of {held.nbytes}")
    elements, item_bytes = len(new_bits), ITEM_BYTES[dtype]
    packed = np.empty(packed_size(elements), np.uint8)
    sent, largest_error, summing = 0, 0.0, xxhash.xxh3_64()
    for start in range(0, elements, CHUNK):
        old, new_here = old_bits[start : start + CHUNK], new_bits[start : start + CHUNK]
        after, mask = new_here, old != new_here
        if threshold:
            largest_error = max(largest_error, _keep_small_changes(mask, old, new_here, dtype, threshold))
            after, changed = old.copy(), np.flatnonzero(mask)
            after[changed] = new_here[changed]
        sent += int(np.count_nonzero(mask))
        packed[start // 8 : packed_size(start + len(mask))] = pack_mask(mask)
        summing.update(after.data)

    checksum = summing.intdigest()
    form: Form = "mask"
    positions = packed
    # A change takes a byte at least, so with as many of them as the mask has bytes, gaps cannot be shorter.
    if sent < len(packed) and len(gaps := encode_gaps(positions_of_mask(packed, elements))) < len(packed):
        form, positions = "gaps", gaps
    if sent * item_bytes + len(positions) < new.nbytes:
        body = [_selected(new_bits, packed, sent), positions]
    else:
        form, body = "whole", [new_bits]
        checksum = bytes_checksum(new_bits.data) if sent < elements and threshold else checksum
        sent, largest_error = elements, 0.0
    body_checksum = checksum if form == "whole" else _checksum(part.data for part in body)
    fields = _FIELDS.pack(
        _MAGIC,
        _FORMAT,
        _FORMS.index(form),
        _DTYPES.index(dtype),
        elements,
        sent,
        sum(part.nbytes for part in body),
        checksum,
        body_checksum,
    )
    data = b"".join((fields, _HEADER_CHECKSUM.pack(bytes_checksum(fields)), *(part.data for part in body)))
    return EncodedBucket(data, form, elements, sent, largest_error, checksum, new.nbytes)


def apply_bucket(encoded: bytes | memoryview, buffer: memoryview, dtype: str) -> int:
    """Turn the bucket that is held into the new one, in place.

    Args:
        encoded: an `EncodedBucket`'s data.
        buffer: the bucket's bytes as `held` was when it was encoded; writable.
        dtype: of its elements.

    Returns:
        The `bytes_checksum` that the buffer must have now. It has another one if it was not what the sender compared
        with; then the bucket must be sent whole.

    Raises:
        WeightsError: the message is damaged, cut short or of another bucket. The buffer is as it was.
    """
    target = _bits(buffer, dtype)
    message = _read(memoryview(encoded).cast("B"), target.nbytes, dtype)
    if message.form == "whole":
        target[:] = message.values
        return message.checksum
    if message.form == "mask":
        changed = positions_of_mask(message.positions, len(target))
    else:
        changed = positions_of_gaps(message.positions)
    done = 0
    for positions in changed:
        target[positions] = message.values[done : done + len(positions)]
        done += len(positions)
    return message.checksum


@dataclass(frozen=True, slots=True)
class _Message:
    form: Form
    values: Bits
    positions: Bytes
    checksum: int


def _read(data: memoryview, nbytes: int, dtype: str) -> _Message:
    """A message for a bucket of `nbytes`, in which everything was found to fit."""
    if data.nbytes < _HEADER_BYTES:
        raise _refused(f"it has {data.nbytes} bytes, less than a header")
    fields = data[: _FIELDS.size]
    (header_checksum,) = _HEADER_CHECKSUM.unpack_from(data, _FIELDS.size)
    magic, version, form_index, dtype_index, elements, sent, body_bytes, checksum, body_checksum = _FIELDS.unpack(
        fields
    )
    if magic != _MAGIC or header_checksum != bytes_checksum(fields):
        raise _refused("its header is damaged")
    if version != _FORMAT or form_index >= len(_FORMS) or dtype_index >= len(_DTYPES):
        raise _refused(f"it is of a format (version {version}) that is not known here")
    item_bytes = ITEM_BYTES[dtype]
    if _DTYPES[dtype_index] != dtype or elements * item_bytes != nbytes:
        raise _refused(
            f"it is of {elements} elements of {_DTYPES[dtype_index]}, the bucket of {nbytes} bytes of {dtype}"
        )
    body = data[_HEADER_BYTES:]
    if body.nbytes != body_bytes:
        raise _refused(f"its body has {body.nbytes} bytes, expected {body_bytes}")
    if bytes_checksum(body) != body_checksum:
        raise _refused("its body is damaged")
    if sent > elements or sent * item_bytes > body_bytes:
        raise _refused(f"it has no room for the {sent} values of {elements} that it announces")
    values = _bits(body[: sent * item_bytes], dtype)
    positions = np.frombuffer(body[sent * item_bytes :], np.uint8)
    form = _FORMS[form_index]
    fits = {"whole": lambda *_: sent == elements and not len(positions), "mask": valid_mask, "gaps": valid_gaps}[form]
    if not fits(positions, elements, sent):
        raise _refused("its positions do not fit its values")
    return _Message(form, values, positions, checksum)


def _checksum(parts: Iterable[memoryview]) -> int:
    """Of the parts as if they were one."""
    summing = xxhash.xxh3_64()
    for part in parts:
        summing.update(part)
    return summing.intdigest()


def _refused(why: str) -> WeightsError:
    return WeightsError(f"an encoded bucket was refused, nothing of it was applied: {why}; it must be sent again")


def _bits(data: bytes | memoryview, dtype: str) -> Bits:
    if dtype not in ITEM_BYTES:
        raise WeightsError(f"weights of dtype {dtype!r} cannot be encoded; expected {', '.join(ITEM_BYTES)}")
    if memoryview(data).nbytes % ITEM_BYTES[dtype]:
        raise WeightsError(f"a bucket of {memoryview(data).nbytes} bytes does not consist of {dtype}")
    return np.frombuffer(data, _BITS[dtype])


def _selected(bits: Bits, packed: Bytes, count: int) -> Bits:
    """The elements whose bit is set."""
    selected = np.empty(count, bits.dtype)
    done = 0
    for positions in positions_of_mask(packed, len(bits)):
        selected[done : done + len(positions)] = bits.take(positions)
        done += len(positions)
    return selected


def _keep_small_changes(changed: Mask, old: Bits, new: Bits, dtype: str, threshold: float) -> float:
    """Take out of the changes those of at most the threshold, and say how large the largest of them is."""
    # Where few elements changed, only those are looked at.
    where: Any = np.flatnonzero(changed) if np.count_nonzero(changed) < len(changed) // 4 else slice(None)
    before, after = _as_float32(old[where], dtype), _as_float32(new[where], dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(after - before)
        # A difference is rounded to float32, as the threshold is here. So what is equal to it is computed once more.
        limit = np.float32(threshold)
    small = errors < limit  # False for NaN
    largest = float(np.where(small, errors, np.float32(0)).max(initial=0))
    if len(near := np.flatnonzero(errors == limit)):
        exact = np.abs(after[near].astype(np.float64) - before[near])
        small[near] = exact <= threshold
        largest = max(largest, float(np.where(small[near], exact, 0).max()))
    changed[where] &= ~small
    return largest


def _as_float32(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype).astype(np.float32, copy=False)
