"""Which packing a policy's micro-batches have: decided by trying it on the policy itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygym import forest_attention
from raygym.forest_packing import assign_forests, pack_forest
from raygym.learner_config import PackingName
from raygym.packing import MicroBatch, assign_micro_batches, pack
from raygym.policy_model import TokenLogprobs
from raygym.types import TrainSequence

logger = logging.getLogger(__name__)

Assign = Callable[[Sequence[TrainSequence], int, int], list[list[tuple[int, ...]]]]
"""Sequences, ranks, tokens of a micro-batch -> for each rank its micro-batches, as indices."""


class Packing(NamedTuple):
    """Sequences -> micro-batches."""

    name: PackingName
    assign: Assign
    pack: Callable[[Sequence[TrainSequence]], MicroBatch]


ROWS = Packing(
    "rows",
    lambda sequences, ranks, budget: assign_micro_batches([len(s.token_ids) for s in sequences], ranks, budget),
    pack,
)
FOREST = Packing(
    "forest",
    lambda sequences, ranks, budget: assign_forests([s.token_ids for s in sequences], ranks, budget),
    pack_forest,
)


def choose_packing(model: TokenLogprobs, wanted: PackingName) -> Packing:
    """The packing that gives the policy's own logprobs, with `forest` before `rows`; sets the policy's attention.

    Args:
        model: not yet in DeepSpeed's hands.
        wanted: `auto`, or the only one that may be taken.

    Raises:
        ValueError: the one wanted gives other logprobs; with `auto`, both do.
    """
    policy = model.policy
    before = policy.config._attn_implementation
    alone = _one_by_one(model)
    problem = ""
    if wanted != "rows":
        try:
            policy.set_attn_implementation(forest_attention.NAME)
            problem = _difference(model, FOREST, alone)
        except Exception as error:  # whatever a model's code does with an attention that it does not know
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            return FOREST
        policy.set_attn_implementation(before)
        if wanted == "forest":
            raise ValueError(
                f"learner.packing: forest: {policy.config.model_type} cannot be computed like that ({problem}); "
                f"use auto"
            )
        logger.warning(
            "learner.packing: rows for %s, whose prompts are computed again and again: %s",
            policy.config.model_type,
            problem,
        )
    if problem := _difference(model, ROWS, alone):
        raise ValueError(
            f"policy.model: {policy.config.model_type} gives other logprobs for sequences packed in one row than for "
            f"each alone ({problem}); expected a causal transformer whose attention follows position_ids and whose "
            f"logits are its output head's; use another model"
        )
    return ROWS


def _probe(vocab_size: int) -> list[TrainSequence]:
    """Two sequences of one prompt, one more, and the beginning of the prompt."""
    rng = np.random.default_rng(0)
    prompt, *rest = (rng.integers(1, vocab_size, length) for length in (40, 9, 24, 12))
    ids = [np.concatenate([prompt, rest[0]]), np.concatenate([prompt, rest[1]]), rest[2], prompt[:20]]
    return [_all_trained(each.astype(np.int32)) for each in ids]


def _all_trained(token_ids: np.ndarray) -> TrainSequence:
    return TrainSequence(token_ids, np.arange(len(token_ids)) > 0, np.zeros(len(token_ids), dtype=np.float32), 1.0)


def _one_by_one(model: TokenLogprobs) -> Tensor:
    """By the model's own forward, a sequence at a time."""
    found = []
    for sequence in _probe(_vocab_size(model)):
        ids = torch.from_numpy(sequence.token_ids).long().to(_device(model))
        with torch.no_grad():
            logits_TV = model.policy(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        found.append(logits_TV.log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    return torch.cat(found)


def _difference(model: TokenLogprobs, packing: Packing, alone_N: Tensor) -> str:
    """What is wrong with the packing's logprobs; nothing where they are right."""
    batch = packing.pack(_probe(_vocab_size(model))).to(_device(model))
    with torch.no_grad():
        logprobs_N, _ = model(batch, 1.0)
    largest = (logprobs_N - alone_N).abs().max().item()
    allowed = 1e-3 if next(model.policy.parameters()).dtype == torch.float32 else 0.25
    return "" if largest <= allowed else f"largest difference {largest:.3g}, allowed {allowed}"


def _vocab_size(model: TokenLogprobs) -> int:
    return int(model.policy.config.get_text_config().vocab_size)


def _device(model: TokenLogprobs) -> torch.device:
    device: torch.device = next(model.policy.parameters()).device
    return device
