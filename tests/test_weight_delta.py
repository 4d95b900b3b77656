"""Encoded buckets: receivers hold the new weights to within the threshold, however often, or nothing was changed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.changed_positions import (
    CHUNK,
    encode_gaps,
    pack_mask,
    positions_of_gaps,
    positions_of_mask,
    valid_gaps,
    valid_mask,
)
from raygym.weight_checksums import bytes_checksum
from raygym.weight_delta import EncodedBucket, apply_bucket, encode_bucket, summarize
from raygym.weights import ITEM_BYTES, WeightsError

BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38, 1.0)
dtypes = st.sampled_from(list(BITS))
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.124, 0.3, 0.95, 1.0])


def as_bits(values: npt.ArrayLike, dtype: str) -> npt.NDArray[Any]:
    tensor = torch.from_numpy(np.asarray(values, np.float32)).to(getattr(torch, dtype))
    return tensor.view(torch.uint8).numpy().view(BITS[dtype]).copy()


def as_float64(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    tensor = torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, dtype))
    return tensor.double().numpy()  # type: ignore[no-any-return]


def view(bits: npt.NDArray[Any]) -> memoryview:
    return memoryview(bits).cast("B")


def encode(held: npt.NDArray[Any], new: npt.NDArray[Any], dtype: str, threshold: float = 0.0) -> EncodedBucket:
    return encode_bucket(view(held), view(new), dtype, threshold)


def changed_bits(elements: int, share: float, seed: int, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Any bits at all, NaN of every payload among them; so many of them differ."""
    random = np.random.default_rng(seed)
    held = random.integers(0, 2 ** (8 * ITEM_BYTES[dtype]), elements, dtype=BITS[dtype])
    new = held.copy()
    new[random.random(elements) < share] ^= BITS[dtype](1 << int(random.integers(8 * ITEM_BYTES[dtype])))
    return held, new


@settings(deadline=None, max_examples=examples(60, 1000))
@given(st.one_of(st.integers(0, 40), st.integers(CHUNK - 9, CHUNK + 9)), shares, seeds, dtypes)
def test_without_a_threshold_every_bit_arrives(elements: int, share: float, seed: int, dtype: str) -> None:
    held, new = changed_bits(elements, share, seed, dtype)
    encoded = encode(held, new, dtype)
    receiver = held.copy()
    assert apply_bucket(encoded.data, view(receiver), dtype) == encoded.checksum == bytes_checksum(new)
    assert np.array_equal(receiver, new)
    assert encoded.largest_error == 0
    assert encoded.sent == (elements if encoded.form == "whole" else np.count_nonzero(held != new))
    assert len(encoded.data) <= new.nbytes + 56  # never more than a header above the whole bucket


@settings(deadline=None, max_examples=examples(60, 1000))
@given(
    st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=24),
    st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=24),
    st.sampled_from([0.0, 1e-41, 0.5]),
    dtypes,
)
def test_nan_infinities_and_signed_zeros(old: list[float], now: list[float], threshold: float, dtype: str) -> None:
    size = min(len(old), len(now))
    held, new = as_bits(old[:size], dtype), as_bits(now[:size], dtype)
    receiver = held.copy()
    apply_bucket(encode(held, new, dtype, threshold).data, view(receiver), dtype)
    exact, got = as_float64(new, dtype), as_float64(receiver, dtype)
    for i in range(size):
        same = receiver[i] == new[i]
        assert same or (threshold and abs(exact[i] - got[i]) <= threshold), (old[i], now[i], got[i])


@settings(deadline=None, max_examples=examples(60, 1000))
@given(st.integers(1, 400), st.sampled_from([1e-6, 1e-3, 0.1]), st.integers(1, 8), seeds, dtypes)
def test_errors_stay_below_the_threshold_over_versions(
    elements: int, threshold: float, versions: int, seed: int, dtype: str
) -> None:
    random = np.random.default_rng(seed)
    weights = random.normal(0, 1, elements)
    held = as_bits(weights, dtype)
    receiver = held.copy()
    drift = random.normal(0, threshold, elements)
    for _ in range(versions):
        weights = weights + drift  # always the same way, so that what is left out would add up
        new = as_bits(weights, dtype)
        encoded = encode(held, new, dtype, threshold)
        before = held.copy()
        for holder in (held, receiver):
            assert apply_bucket(encoded.data, view(holder), dtype) == bytes_checksum(holder)
        assert np.array_equal(held, receiver)
        left = np.abs(as_float64(new, dtype) - as_float64(receiver, dtype))
        assert left.max() <= threshold
        assert encoded.largest_error == pytest.approx(left.max(), rel=1e-6)
        if encoded.form != "whole":
            # What is sent is needed, and arrives as it is.
            needed = np.abs(as_float64(new, dtype) - as_float64(before, dtype)) > threshold
            assert encoded.sent == np.count_nonzero(needed)
            assert np.array_equal(receiver[needed], new[needed]) and np.array_equal(receiver[~needed], before[~needed])


def test_a_change_of_exactly_the_threshold_is_not_sent_and_the_next_larger_one_is() -> None:
    for threshold in (0.1, 0.25, 1e-3):  # 0.1 and 1e-3 are no float32
        held = np.zeros(64, np.float32)
        new = held.copy()
        near = np.float32(threshold)
        new[:3] = np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(1))
        encoded = encode(held.view(np.uint32), new.view(np.uint32), "float32", threshold)
        assert encoded.sent == np.count_nonzero(new.astype(np.float64) > threshold)
        assert encoded.largest_error == max(v for v in new.astype(np.float64) if v <= threshold)


@pytest.mark.parametrize("dtype", list(BITS))
def test_the_shortest_form_is_taken(dtype: str) -> None:
    elements, item = 1 << 15, ITEM_BYTES[dtype]
    held = np.zeros(elements, BITS[dtype])
    for share, form, position_bytes in (
        (0.0, "gaps", 0.0),
        (0.001, "gaps", 0.005),
        (0.115, "gaps", 0.12),
        (0.13, "mask", 0.125),
        (0.9, "mask", 0.125),
        (1.0, "whole", 0.0),
    ):
        new = held.copy()
        count = round(share * elements)
        new[np.linspace(0, elements - 1, count).astype(int) if count else []] = 1
        encoded = encode(held, new, dtype)
        assert encoded.form == form, share
        assert len(encoded.data) <= encoded.sent * item + position_bytes * elements + 56


damage = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("grow"), st.floats(0, 1, exclude_max=True), st.just(0)),
)


@settings(deadline=None, max_examples=examples(60, 1000))
@given(st.sampled_from([0.0, 0.02, 0.3, 1.0]), damage, seeds, dtypes)
def test_what_is_damaged_is_refused_and_nothing_of_it_applied(
    share: float, how: tuple[str, float, int], seed: int, dtype: str
) -> None:
    held, new = changed_bits(500, share, seed, dtype)
    data = bytearray(encode(held, new, dtype).data)
    kind, where, bit = how
    place = int(where * len(data))
    if kind == "flip":
        data[place] ^= 1 << bit
    elif kind == "cut":
        del data[place:]
    else:
        data.insert(place, 0)
    receiver = held.copy()
    with pytest.raises(WeightsError, match="nothing of it was applied"):
        apply_bucket(bytes(data), view(receiver), dtype)
    assert np.array_equal(receiver, held)


def with_checksums(data: bytes, sent: int, body: bytes) -> bytes:
    """A message whose checksums are right and whose content is not."""
    fields = bytearray(data[:48])
    struct.pack_into("<QQ", fields, 16, sent, len(body))
    struct.pack_into("<Q", fields, 40, bytes_checksum(body))
    return bytes(fields) + struct.pack("<Q", bytes_checksum(fields)) + body


def test_contents_that_make_no_sense_are_refused_whatever_their_checksums() -> None:
    held = np.zeros(20, np.uint32)
    few, many = held.copy(), held.copy()
    few[3], many[:12] = 1, 1
    gaps, mask, whole = (encode(held, new, "float32").data for new in (few, many, held + 1))
    value = struct.pack("<I", 7)
    for data, sent, body in (
        (gaps, 1, value + bytes([20])),  # beyond the end
        (gaps, 1, value + bytes([255])),  # a gap that does not end
        (gaps, 1, value + bytes([255, 0])),
        (gaps, 2, 2 * value + bytes([1])),  # fewer positions than values
        (gaps, 1, value),
        (gaps, 9, value),  # fewer values than it says
        (mask, 2, 2 * value + bytes([1, 0, 0])),
        (mask, 1, value + bytes([0, 0, 0x10])),  # a bit beyond the end
        (mask, 1, value + bytes([1, 0])),
        (whole, 19, 19 * value),
        (whole, 21, 21 * value),
    ):
        receiver = held.copy()
        with pytest.raises(WeightsError, match="nothing of it was applied"):
            apply_bucket(with_checksums(data, sent, body), view(receiver), "float32")
        assert not receiver.any()
    receiver = held.copy()
    apply_bucket(with_checksums(gaps, 1, value + bytes([19])), view(receiver), "float32")
    assert receiver[19] == 7  # so the messages above were refused for what is wrong with them


def test_a_message_of_another_bucket_is_refused() -> None:
    held = np.zeros(8, np.uint16)
    data = encode(held, held + np.uint16(1), "bfloat16").data
    for buffer, dtype, words in (
        (np.zeros(9, np.uint16), "bfloat16", "18 bytes of bfloat16"),
        (np.zeros(8, np.uint16), "float16", "of bfloat16, the bucket of 16 bytes of float16"),
        (np.zeros(8, np.uint16), "int8", "'int8'"),
    ):
        with pytest.raises(WeightsError, match=words):
            apply_bucket(data, view(buffer), dtype)
        assert not buffer.any()


def test_a_receiver_that_held_something_else_sees_it_in_the_checksum() -> None:
    held = np.zeros(1000, np.uint32)
    new = held.copy()
    new[5] = 1
    other = held.copy()
    other[700] = 1
    assert apply_bucket(encode(held, new, "float32").data, view(other), "float32") != bytes_checksum(other)


def test_buckets_that_cannot_be_compared() -> None:
    with pytest.raises(WeightsError, match="8 bytes cannot be compared with one of 4"):
        encode_bucket(memoryview(bytes(4)), memoryview(bytes(8)), "float32", 0)
    with pytest.raises(WeightsError, match="3 bytes does not consist of float16"):
        encode_bucket(memoryview(bytes(3)), memoryview(bytes(3)), "float16", 0)
    for threshold in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="0 or above"):
            encode_bucket(memoryview(bytes(4)), memoryview(bytes(4)), "float32", threshold)


def test_a_read_only_buffer_is_not_a_damaged_message() -> None:
    held = np.zeros(8, np.uint32)
    with pytest.raises(ValueError, match="read-only"):
        apply_bucket(encode(held, held + np.uint32(1), "float32").data, memoryview(bytes(32)), "float32")


def test_a_version_is_summed_up() -> None:
    held = np.zeros(1000, np.float32)
    new = held.copy()
    new[:10], new[10] = 1, 0.25
    first = encode(held.view(np.uint32), new.view(np.uint32), "float32", 0.5)
    second = encode(held.view(np.uint32), held.view(np.uint32) + 1, "float32")
    summary = summarize([first, second])
    assert (summary.full_nbytes, summary.sent_share, summary.largest_error) == (8000, 1010 / 2000, 0.25)
    assert summary.nbytes == len(first.data) + len(second.data)
    assert summarize([]).sent_share == 0


@settings(deadline=None, max_examples=examples(60, 1000))
@given(st.integers(1, 3000), st.floats(0, 1), seeds)
def test_positions_come_back_from_both_forms(elements: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random(elements) < share**4
    expected, packed = np.flatnonzero(mask), pack_mask(mask)
    assert valid_mask(packed, elements, len(expected))
    assert np.array_equal(np.concatenate(list(positions_of_mask(packed, elements))), expected)
    gaps = encode_gaps(positions_of_mask(packed, elements))
    assert valid_gaps(gaps, elements, len(expected))
    assert not valid_gaps(gaps, int(expected[-1]) if len(expected) else 0, len(expected)) or not len(expected)
    assert np.array_equal(np.concatenate([[], *positions_of_gaps(gaps)]), expected)
    assert len(expected) <= len(gaps) <= len(expected) + elements / 255
