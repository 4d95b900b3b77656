"""Sequences -> micro-batches that are forests: no padding, and what sequences begin with in common is computed once.

For policies with `forest_attention`; `packing.py` is for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from raygym.forest_attention import ForestLayout
from raygym.packing import MicroBatch, micro_batch
from raygym.prefix_forest import MIN_SHARED, Node, PrefixForest, build_forest, common_prefix, lexicographic
from raygym.types import Int32Array, TrainSequence


def assign_forests(
    sequences: Sequence[Int32Array], num_ranks: int, tokens_per_micro_batch: int
) -> list[list[tuple[int, ...]]]:
    """Share sequences out over ranks and cut each rank's share into micro-batches.

    Args:
        sequences: the token IDs of each, at least one token.
        num_ranks: how many learners there are.
        tokens_per_micro_batch: budget of computed tokens, shared ones counted once. A sequence longer than this gets a
            micro-batch for itself.

    Returns:
        For each rank its micro-batches as tuples of indices into `sequences`. Every index appears once. All ranks have
        the same number of micro-batches, at least one, since they run collectives together; the last ones may be empty.
        Neighbours in lexicographic order stay together, so that what they share is computed on one rank only. No rank
        computes more than an equal part of what one rank alone would, and one longest sequence.
    """
    order = lexicographic(sequences)
    new = [len(sequences[order[0]])] if order else []
    for before, item in pairwise(order):
        shared = common_prefix(sequences[before], sequences[item])
        new.append(len(sequences[item]) - (shared if shared >= MIN_SHARED else 0))
    whole = [len(sequences[index]) for index in order]
    shares = _even_runs(new, whole, num_ranks)
    ranks = [_cut(order[first:last], new[first:last], sequences, tokens_per_micro_batch) for first, last in shares]
    count = max(1, *(len(rank) for rank in ranks))
    return [rank + [()] * (count - len(rank)) for rank in ranks]


def _even_runs(new: Sequence[int], whole: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Cuts a line of items into at most `parts` runs whose largest cost is the least; empty runs at the end.

    Args:
        new: what each item costs after the one before it.
        whole: what it costs as the first of a run.
        parts: how many runs.
    """
    low, high = max(whole, default=0), sum(whole)
    while low < high:
        most = (low + high) // 2
        low, high = (low, most) if len(_runs(new, whole, most)) <= parts else (most + 1, high)
    runs = _runs(new, whole, low)
    return runs + [(len(new), len(new))] * (parts - len(runs))


def _runs(new: Sequence[int], whole: Sequence[int], most: int) -> list[tuple[int, int]]:
    """As few runs as cost at most `most` each, or one item."""
    bounds, cost = [0], 0
    for item in range(len(new)):
        if item > bounds[-1] and cost + new[item] > most:
            bounds.append(item)
        cost = whole[item] if item == bounds[-1] else cost + new[item]
    return list(zip(bounds, [*bounds[1:], len(new)], strict=True)) if new else []


def _cut(
    items: Sequence[int], new: Sequence[int], sequences: Sequence[Int32Array], budget: int
) -> list[tuple[int, ...]]:
    """Micro-batches of neighbours, as many of them as fit; `new` as in `_even_runs`."""
    micro_batches: list[tuple[int, ...]] = []
    first = 0
    while first < len(items):
        last, cost = first + 1, len(sequences[items[first]])
        while last < len(items) and cost + new[last] <= budget:
            cost += new[last]
            last += 1
        # The sum takes all that neighbours share for saved; the forest leaves out what is not worth a node.
        while last - first > 1 and _computed([sequences[index] for index in items[first:last]]) > budget:
            last -= 1
        micro_batches.append(tuple(items[first:last]))
        first = last
    return micro_batches


def _computed(sequences: Sequence[Int32Array]) -> int:
    return len(build_forest(sequences).token_ids_T)


def pack_forest(sequences: Sequence[TrainSequence]) -> MicroBatch:
    """One micro-batch as a forest in one row. The sequences may be none: a dummy of one token."""
    if not sequences:
        layout = ForestLayout((Node(0, 1, 1),), torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1)
        return micro_batch(np.zeros((1, 1)), np.zeros((1, 1)), (), (), layout)
    forest = build_forest([sequence.token_ids for sequence in sequences])
    layout = forest_layout(forest)
    return micro_batch(forest.token_ids_T[None], forest.positions_T[None], sequences, forest.places, layout)


def forest_layout(forest: PrefixForest) -> ForestLayout:
    """What attention needs of it."""
    ends_T = np.empty(len(forest.token_ids_T), dtype=np.int64)
    for node in forest.nodes:
        ends_T[node.start : node.end] = node.subtree_end
    positions_T = torch.from_numpy(forest.positions_T)
    return ForestLayout(forest.nodes, torch.from_numpy(ends_T), positions_T, int(positions_T.max()) + 1)
