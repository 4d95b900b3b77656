"""Many turns, or many answers, as a few arrays: crossing to another process costs by the object, not by the byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raygym.types import EpisodeFailure, FailureKind, Float32Array, Generation, Int32Array, Sampling

_NO_SEED = -1


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn that wants a continuation."""

    number: int
    """Unique among the requests of its sender."""
    session_id: str
    prompt_token_ids: Int32Array
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class TurnBatch:
    """N requests; `unpack` gives them back."""

    numbers: tuple[int, ...]
    session_ids: tuple[str, ...]
    prompts: Int32Array
    """All prompts, one after the other."""
    lengths: tuple[int, ...]
    samplings: tuple[tuple[float, int, int], ...]
    """Temperature, max_tokens, and the seed or -1."""

    def unpack(self) -> list[TurnRequest]:
        """The requests, in order."""
        ends = np.cumsum(self.lengths)
        return [
            TurnRequest(number, session, self.prompts[end - length : end], Sampling(temperature, most, _seed(seed)))
            for number, session, end, length, (temperature, most, seed) in zip(
                self.numbers, self.session_ids, ends.tolist(), self.lengths, self.samplings, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """N generations and M failures; `unpack` gives them back."""

    numbers: tuple[int, ...]
    token_ids: Int32Array
    logprobs: Float32Array
    weight_versions: Int32Array
    """All generations, one after the other, as are the two above."""
    lengths: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    failures: tuple[tuple[int, str, str], ...]
    """Number, kind and detail."""

    def unpack(self) -> dict[int, Generation | EpisodeFailure]:
        """Each request's answer, by its number."""
        answers: dict[int, Generation | EpisodeFailure] = {}
        ends = np.cumsum(self.lengths, dtype=np.int64).tolist()
        for number, end, length, reason in zip(self.numbers, ends, self.lengths, self.finish_reasons, strict=True):
            at = slice(end - length, end)
            answers[number] = Generation(self.token_ids[at], self.logprobs[at], self.weight_versions[at], reason)
        for number, kind, detail in self.failures:
            answers[number] = EpisodeFailure(FailureKind(kind), detail)
        return answers


def pack_turns(requests: Sequence[TurnRequest]) -> TurnBatch:
    """Requests as one batch."""
    return TurnBatch(
        numbers=tuple(request.number for request in requests),
        session_ids=tuple(request.session_id for request in requests),
        prompts=_joined([request.prompt_token_ids for request in requests], np.int32),
        lengths=tuple(len(request.prompt_token_ids) for request in requests),
        samplings=tuple(
            (s.temperature, s.max_tokens, _NO_SEED if s.seed is None else s.seed)
            for s in (request.sampling for request in requests)
        ),
    )


def pack_answers(answers: Mapping[int, Generation | EpisodeFailure]) -> AnswerBatch:
    """Answers as one batch."""
    generations = {number: answer for number, answer in answers.items() if isinstance(answer, Generation)}
    failures = ((number, answer) for number, answer in answers.items() if isinstance(answer, EpisodeFailure))
    return AnswerBatch(
        numbers=tuple(generations),
        token_ids=_joined([g.token_ids for g in generations.values()], np.int32),
        logprobs=_joined([g.logprobs for g in generations.values()], np.float32),
        weight_versions=_joined([g.weight_versions for g in generations.values()], np.int32),
        lengths=tuple(len(g.token_ids) for g in generations.values()),
        finish_reasons=tuple(g.finish_reason for g in generations.values()),
        failures=tuple((number, str(failure.kind), failure.detail) for number, failure in failures),
    )


def _joined(arrays: Sequence[Any], dtype: type) -> Any:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def _seed(seed: int) -> int | None:
    return None if seed == _NO_SEED else seed
