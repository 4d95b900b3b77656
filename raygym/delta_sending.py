"""Both ends of one bucket that travels as what changed of it: the sender's memory and the receiver's end up equal."""

from __future__ import annotations

import numpy as np

from raygym.weight_delta import EncodedBucket, apply_bucket, encode_bucket


def encode_in_place(held: memoryview, new: memoryview, dtype: str, threshold: float) -> EncodedBucket:
    """What to send; afterwards `new` is what receivers that hold `held` make of it.

    With a threshold above 0 that is not quite what it was: the sender keeps it as the receivers do, so that errors do
    not add up over versions, and that replicas on its own node serve the same weights as all others.
    """
    encoded = encode_bucket(held, new, dtype, threshold)
    if threshold > 0 and encoded.form != "whole":  # also where only the sign of a zero was left out
        apply_to_copy(encoded.data, held, new, dtype)
    return encoded


def apply_to_copy(encoded: bytes | memoryview, held: memoryview, into: memoryview, dtype: str) -> None:
    """Make the new bucket out of the one that is held, which stays as it is.

    Raises:
        WeightsError: the message is damaged; `into` is a copy of `held` then.
    """
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(held, np.uint8))
    apply_bucket(encoded, into, dtype)
