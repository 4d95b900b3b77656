"""One trajectory as the page shows it: its conversation by turns, and its tokens a part at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raygym.message_turns import turn_of
from raygym.viewer.token_text import TokenText

Record = Mapping[str, Any]
"""A line of a trajectories' file; see `trajectory_record`."""
_ARRAYS = ("token_ids", "loss_mask", "logprobs", "weight_versions", "learner_logprobs")
MOST_TOKENS = 5000
"""Of one answer."""


def parse_record(line: bytes) -> Record:
    """The record of a line. Numbers that are not finite are None, as a browser's JSON needs it.

    Raises:
        ValueError: it is none.
    """
    record = json.loads(line, parse_constant=lambda _: None)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record


def conversation(record: Record, tokens: TokenText | None) -> dict[str, Any]:
    """All but the tokens: what the record says of the episode, its messages, turns, and which tokens are whose.

    `turn_of` has for each message the turn that it belongs to, None for the prompt: the policy's message and what the
    environment answered. `segments` cover the tokens in order. `retokenized`: where the text of a turn would be
    tokenized in another way; None without a tokenizer.
    """
    turns = record["turns"]
    told = {name: value for name, value in record.items() if name not in _ARRAYS}
    return {
        **told,
        "tokens": len(record["token_ids"]),
        "turn_of": turn_of(record["messages"], len(turns)),
        "segments": segments(turns, len(record["token_ids"])),
        "has_learner": record.get("learner_logprobs") is not None,
        "asked_learner": "learner_logprobs" in record,
        "has_text": tokens is not None,
        "retokenized": None if tokens is None else _retokenized(record, tokens),
        "logprob_of_turn": [_mean_logprob(record, turn) for turn in turns],
    }


def segments(turns: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Which tokens are whose: `start` to `end` by `prompt`, `policy` or `environment`; none is empty."""
    found: list[dict[str, Any]] = []

    def add(kind: str, start: int, end: int, turn: int | None) -> None:
        if end > start:
            found.append({"kind": kind, "start": start, "end": end, "turn": turn})

    at = 0
    for number, turn in enumerate(turns):
        add("environment" if number else "prompt", at, turn["start"], number - 1 if number else None)
        add("policy", turn["start"], turn["end"], number)
        at = turn["end"]
    add("environment" if turns else "prompt", at, tokens, len(turns) - 1 if turns else None)
    return found


def token_part(record: Record, start: int, tokens: TokenText | None) -> dict[str, Any]:
    """Tokens from `start`, at most `MOST_TOKENS`: a list for each of what is known of them.

    `learner` is None where the run has not recorded what the learner computed; of single tokens that were not trained
    it is null. `texts` is None without a tokenizer.
    """
    length = len(record["token_ids"])
    start = min(max(0, start), length)
    end = min(length, start + MOST_TOKENS)
    ids = record["token_ids"][start:end]
    learner = record.get("learner_logprobs")
    return {
        "start": start,
        "end": end,
        "total": length,
        "ids": ids,
        "texts": None if tokens is None else [tokens.text(token_id) for token_id in ids],
        "special": None if tokens is None else [tokens.is_special(token_id) for token_id in ids],
        "mask": [int(trained) for trained in record["loss_mask"][start:end]],
        "logprobs": record["logprobs"][start:end],
        "learner": None if learner is None else learner[start:end],
        "versions": record["weight_versions"][start:end],
    }


def _retokenized(record: Record, tokens: TokenText) -> list[dict[str, Any]]:
    return [
        {"start": span.start, "end": span.end, "instead": list(span.instead)}
        for turn in record["turns"]
        for span in tokens.retokenized(record["token_ids"][turn["start"] : turn["end"]], turn["start"])
    ]


def _mean_logprob(record: Record, turn: Mapping[str, Any]) -> float | None:
    values = [value for value in record["logprobs"][turn["start"] : turn["end"]] if value is not None]
    return sum(values) / len(values) if values else None
