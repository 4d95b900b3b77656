"""The tokens of an episode that NeMo Gym's agent has played, out of the items that it answered with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raygym.engine import NO_LOGPROB
from raygym.types import BoolArray, EpisodeFailure, FailureKind, Float32Array, Int32Array

_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")


@dataclass(frozen=True, slots=True)
class Tokens:
    """T tokens of one episode, as the policy saw and produced them."""

    token_ids: Int32Array
    loss_mask: BoolArray
    logprobs: Float32Array
    spans: tuple[tuple[int, int], ...]
    """Start and end of each generation."""


def read_tokens(items: Sequence[Mapping[str, Any]]) -> Tokens:
    """The episode's tokens; each turn's prompt must begin with all tokens before it.

    The model server puts a call's IDs on the last item of its answer: reasoning, text or function call.

    Args:
        items: the output of the whole episode's response.

    Raises:
        EpisodeFailure: `missing_token_ids`: an answer of the policy lacks them, or there is none. `forked`: a prompt
            does not continue what came before, so the agent has rewritten its history. `invalid_logprobs`: one is
            unusable.
    """
    ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    spans: list[tuple[int, int]] = []
    for carrier in _carriers(items):
        prompt, generation, scores = (carrier[field] for field in _FIELDS)
        if len(generation) != len(scores):
            raise _missing(f"{len(generation)} generated IDs come with {len(scores)} logprobs")
        if prompt[: len(ids)] != ids:
            at = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            raise EpisodeFailure(
                FailureKind.FORKED,
                f"the prompt of turn {len(spans) + 1} differs at token {at} from the {len(ids)} tokens before it: the "
                "agent has rewritten its history",
            )
        new = len(prompt) - len(ids)
        start = len(prompt)
        ids = [*prompt, *generation]
        mask += [False] * new + [True] * len(generation)
        logprobs += [0.0] * new + list(scores)
        spans.append((start, len(ids)))
    scores_T = np.asarray(logprobs, np.float64)
    bad = ~(np.isfinite(scores_T) & (scores_T > NO_LOGPROB))
    if bad.any():
        at = int(np.argmax(bad))
        raise EpisodeFailure(FailureKind.INVALID_LOGPROBS, f"the logprob of token {at} is {scores_T[at]}")
    return Tokens(np.asarray(ids, np.int32), np.asarray(mask, np.bool_), scores_T.astype(np.float32), tuple(spans))


def _carriers(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The item of each answer that carries its IDs."""
    carriers: list[Mapping[str, Any]] = []
    unmatched = 0
    for item in items:
        if not _generated(item):
            if unmatched:
                raise _missing(f"answer {len(carriers) + 1} of the policy has none")
        elif all(isinstance(item.get(field), list) and item.get(field) for field in _FIELDS):
            carriers.append(item)
            unmatched = 0
        else:
            unmatched += 1
    if unmatched or not carriers:
        raise _missing(f"answer {len(carriers) + 1} of the policy has none" if items else "the response has no output")
    return carriers


def _generated(item: Mapping[str, Any]) -> bool:
    kind = item.get("type")
    return kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")


def _missing(detail: str) -> EpisodeFailure:
    return EpisodeFailure(
        FailureKind.MISSING_TOKEN_IDS,
        f"{detail}; expected {', '.join(_FIELDS)} (is the model server's return_token_id_information on?)",
    )
