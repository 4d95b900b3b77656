"""Turns and answers as bytes, many at once: what is ready at the same moment travels together.

MessagePack with arrays as raw bytes: it costs microseconds, and reading it runs no code, as unpickling would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from raygym.types import EpisodeFailure, FailureKind, Generation, Int32Array, Sampling


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn that wants a continuation."""

    number: int
    """Unique among the requests of its sender."""
    session_id: str
    prompt_token_ids: Int32Array
    sampling: Sampling


def pack_turns(requests: Sequence[TurnRequest], cancelled: Sequence[int] = ()) -> bytes:
    """New requests, and the numbers of those that nobody waits for any more."""
    turns = [
        (r.number, r.session_id, _int32(r.prompt_token_ids), s.temperature, s.max_tokens, s.seed)
        for r, s in ((request, request.sampling) for request in requests)
    ]
    return _pack((turns, list(cancelled)))


def unpack_turns(data: bytes) -> tuple[list[TurnRequest], list[int]]:
    """What `pack_turns` packed, in order."""
    turns, cancelled = msgpack.unpackb(data)
    requests = [
        TurnRequest(number, session_id, np.frombuffer(prompt, np.int32), Sampling(temperature, max_tokens, seed))
        for number, session_id, prompt, temperature, max_tokens, seed in turns
    ]
    return requests, cancelled


def pack_answers(answers: Mapping[int, Generation | EpisodeFailure]) -> bytes:
    """Each request's answer, by its number."""
    return _pack([(number, *_fields(answer)) for number, answer in answers.items()])


def unpack_answers(data: bytes) -> dict[int, Generation | EpisodeFailure]:
    """What `pack_answers` packed."""
    answers: dict[int, Generation | EpisodeFailure] = {}
    for number, *fields in msgpack.unpackb(data):
        if len(fields) == 2:
            answers[number] = EpisodeFailure(FailureKind(fields[0]), fields[1])
            continue
        token_ids, logprobs, versions, reason = fields
        answers[number] = Generation(
            np.frombuffer(token_ids, np.int32),
            np.frombuffer(logprobs, np.float32),
            np.frombuffer(versions, np.int32),
            reason,
        )
    return answers


def _fields(answer: Generation | EpisodeFailure) -> tuple[Any, ...]:
    if isinstance(answer, EpisodeFailure):
        return str(answer.kind), answer.detail
    logprobs = np.asarray(answer.logprobs, np.float32).tobytes()
    return _int32(answer.token_ids), logprobs, _int32(answer.weight_versions), answer.finish_reason


def _int32(array: Int32Array) -> bytes:
    return np.asarray(array, np.int32).tobytes()


def _pack(message: Any) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed
