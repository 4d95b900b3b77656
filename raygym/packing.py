"""Sequences -> micro-batches: who computes what, and in which shape.

A micro-batch is B rows of L tokens. A row holds one or more whole sequences, one after the other; positions restart at
0 with each, from which Transformers builds a block-diagonal mask (none at all where every row holds one sequence:
then causality alone keeps the padding at a row's end out of sight). A token's attention
costs in proportion to L, so rows are short: at most twice the longest sequence, or 512 tokens. Shorter sequences fill
the gaps, so there is next to no padding.

Legend: B rows, L tokens a row, N trained tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygym.forest_attention import ForestLayout
from raygym.types import Int32Array, TrainSequence

_CHEAP_ROW = 512
_ROW_LENGTHS = 9
"""How many row lengths are tried for a micro-batch."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. N >= 1: where nothing is trained, one token of weight 0 stands in (see `pack`)."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    positions_N: Tensor
    """Flat index (row x L + column) of the token *before* each trained one: where it is predicted."""
    target_ids_N: Tensor
    behaviour_N: Tensor
    """float32 logprobs of the engine that sampled."""
    advantages_N: Tensor
    mask_N: Tensor
    """False only for a stand-in."""
    sequence_N: Tensor
    """A number below N, the same for the tokens of one sequence and for no others."""
    num_tokens: int
    """Tokens of the sequences, each sequence's counted by itself."""
    num_computed: int
    """The same without what several of them share, which is computed once."""
    num_pairs: int
    """T x T of each sequence, summed; of what several share, once. (2 x position + 1 of each computed token.)"""
    most_trained: int = 0
    """Trained tokens of that rank's micro-batch which has the most, of those that are computed at the same time."""
    forest: ForestLayout | None = None
    """Where the one row is a `PrefixForest`."""

    @property
    def num_cells(self) -> int:
        """B x L: tokens computed, padding included."""
        return self.input_ids_BL.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


def assign_micro_batches(
    lengths: Sequence[int], num_ranks: int, tokens_per_micro_batch: int
) -> list[list[tuple[int, ...]]]:
    """Share sequences out over ranks and cut each rank's share into micro-batches.

    Args:
        lengths: tokens of each sequence, all >= 1.
        num_ranks: how many learners there are.
        tokens_per_micro_batch: budget of B x L. A sequence longer than this gets a micro-batch for itself.

    Returns:
        For each rank its micro-batches as tuples of indices into `lengths`. Every index appears once. All ranks have
        the same number of micro-batches, at least one, since they run collectives together; the last ones may be
        empty. Two ranks' tokens differ by no more than the longest sequence.
    """
    assert all(length >= 1 for length in lengths), "a sequence without tokens cannot be packed"
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in longest_first:
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    ranks = [_cut(share, lengths, tokens_per_micro_batch) for share in shares]
    count = max(1, *(len(rank) for rank in ranks))
    return [rank + [()] * (count - len(rank)) for rank in ranks]


def _cut(longest_first: list[int], lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    micro_batches: list[tuple[int, ...]] = []
    remaining = longest_first
    while remaining:
        rows = _fill_rows([lengths[index] for index in remaining], budget)
        taken = {item for row in rows for item in row}
        micro_batches.append(tuple(remaining[item] for item in sorted(taken)))
        remaining = [index for item, index in enumerate(remaining) if item not in taken]
    return micro_batches


def _fill_rows(lengths: Sequence[int], budget: int | None = None) -> list[list[int]]:
    """The rows of one micro-batch, as indices into `lengths`, which descend. The first is always placed.

    Of several row lengths, the one that leaves the smallest part of the cells empty; the shortest of equals. With a
    budget, what fits in no row is left out; without one, everything is placed. What a call with a budget placed is
    placed in no more cells by a call without one, which is how `pack` keeps the budget.
    """
    if not lengths:
        return []
    # Up to 512 tokens attention is a small part of a layer's arithmetic, masked or not.
    limit = max(2 * lengths[0], _CHEAP_ROW)
    best: list[list[int]] = []
    best_fill = 0.0
    for step in range(_ROW_LENGTHS):
        capacity = lengths[0] + (limit - lengths[0]) * step // (_ROW_LENGTHS - 1)
        if step and budget is not None and capacity > budget:
            break
        rows = _first_fit(lengths, capacity, len(lengths) if budget is None else max(1, budget // capacity))
        loads = [sum(lengths[item] for item in row) for row in rows]
        fill = sum(loads) / (len(rows) * max(loads))
        if fill > best_fill:
            best, best_fill = rows, fill
    return best


def _first_fit(lengths: Sequence[int], capacity: int, max_rows: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    most_room = 0
    for item, length in enumerate(lengths):
        if length <= most_room:
            row = next(r for r, free in enumerate(room) if free >= length)
        elif len(rows) < max_rows:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        else:
            continue
        rows[row].append(item)
        room[row] -= length
        most_room = max(room)
    return rows


def pack(sequences: Sequence[TrainSequence]) -> MicroBatch:
    """Lay the sequences of one micro-batch out in rows, longest first. They may be none: a dummy of one token."""
    longest_first = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].token_ids))
    lengths = [len(sequences[index].token_ids) for index in longest_first]
    rows = _fill_rows(lengths)
    shape = (max(1, len(rows)), max([1, *(sum(lengths[item] for item in row) for row in rows)]))
    ids_BL, positions_BL = np.zeros(shape, dtype=np.int64), np.tile(np.arange(shape[1]), (shape[0], 1))
    places: dict[int, Int32Array] = {}
    for row, items in enumerate(rows):
        start = 0
        for index in (longest_first[item] for item in items):
            ids = sequences[index].token_ids
            ids_BL[row, start : start + len(ids)] = ids
            # Up to the row's end, so that padding continues the last sequence instead of starting another, but never
            # past the positions that the model is known to have.
            positions_BL[row, start:] = np.minimum(np.arange(shape[1] - start), max(lengths) - 1)
            places[index] = np.arange(start, start + len(ids), dtype=np.int32) + row * shape[1]
            start += len(ids)
    return micro_batch(ids_BL, positions_BL, sequences, [places[index] for index in range(len(sequences))])


def micro_batch(
    ids_BL: NDArray[Any],
    positions_BL: NDArray[Any],
    sequences: Sequence[TrainSequence],
    places: Sequence[Int32Array],
    forest: ForestLayout | None = None,
) -> MicroBatch:
    """A micro-batch whose sequences' tokens are where `places` says, as flat indices. Trained tokens come in the
    order of the sequences.

    If nothing is trained, one token of weight 0 is predicted anyway, since under ZeRO-3 every rank has to run through
    all layers, the output head included.
    """
    assert not any(sequence.loss_mask[0] for sequence in sequences), "a first token has no prediction"
    trained = [np.flatnonzero(sequence.loss_mask) for sequence in sequences]
    starts = np.cumsum([0, *(len(tokens) for tokens in trained)])
    pairs = list(zip(sequences, trained, strict=True))
    used = np.unique(np.concatenate(places)) if places else np.zeros(0, dtype=np.int32)
    return MicroBatch(
        input_ids_BL=torch.from_numpy(ids_BL).long(),
        position_ids_BL=torch.from_numpy(positions_BL).long(),
        positions_N=_joined([where[tokens - 1] for where, tokens in zip(places, trained, strict=True)], torch.int64),
        target_ids_N=_joined([sequence.token_ids[tokens] for sequence, tokens in pairs], torch.int64),
        behaviour_N=_joined([sequence.logprobs[tokens] for sequence, tokens in pairs], torch.float32),
        advantages_N=_joined([sequence.advantages[tokens] for sequence, tokens in pairs], torch.float32),
        mask_N=torch.full((max(1, int(starts[-1])),), bool(starts[-1])),
        sequence_N=_joined(
            [np.full(len(tokens), start) for start, tokens in zip(starts[:-1], trained, strict=True)], torch.int64
        ),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        num_computed=len(used),
        num_pairs=int((2 * positions_BL.reshape(-1)[used].astype(np.int64) + 1).sum()),
        forest=forest,
    )


def _joined(parts: list[NDArray[Any]], dtype: torch.dtype) -> Tensor:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return torch.as_tensor(values if len(values) else np.zeros(1)).to(dtype)
