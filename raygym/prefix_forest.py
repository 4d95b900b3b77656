"""Token sequences as a forest: what several of them begin with is there once.

A group's sequences share their prompt, and often all prompts share a system message. A causal transformer's hidden
state of a token depends on the tokens before it only, so a shared beginning need be computed once.

The nodes of the forest lie one after the other in one row of T tokens, each before its children, so that what continues
a node follows it without a gap. A token attends to the tokens of its own node up to itself and to all of the nodes
above. In the row: token q sees token k exactly if k <= q < (end of what continues k's node).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raygym.types import Int32Array

MIN_SHARED = 16
"""Tokens that a node must save to be worth its own attention calls."""


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens in the row. 0 <= start < end <= subtree_end."""

    start: int
    end: int
    subtree_end: int
    """End of the last node that continues this one; `end` where none does."""


@dataclass(frozen=True, slots=True)
class PrefixForest:
    """Some sequences in one row."""

    token_ids_T: Int32Array
    positions_T: Int32Array
    """Of each token in its sequences, from 0."""
    nodes: tuple[Node, ...]
    """In the order of the row, which they cover."""
    places: tuple[Int32Array, ...]
    """For each sequence, in the order given: where in the row its tokens are."""


def lexicographic(sequences: Sequence[Int32Array]) -> list[int]:
    """Indices in the order of the token IDs, in which neighbours share most."""
    # Bytes of big-endian numbers compare as the numbers do.
    keys = [ids.astype(">i4").tobytes() for ids in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def common_prefix(a: Int32Array, b: Int32Array) -> int:
    """With how many equal tokens both begin."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def build_forest(sequences: Sequence[Int32Array]) -> PrefixForest:
    """The forest of at least one sequence, none of them empty.

    A beginning becomes a node of its own where that saves at least `MIN_SHARED` tokens.
    """
    order = lexicographic(sequences)
    ordered = [sequences[index] for index in order]
    # shared[i]: of i and i + 1; of a whole run of neighbours it is the least of theirs.
    shared = [common_prefix(a, b) for a, b in pairwise(ordered)]
    builder = _Builder([len(ids) for ids in ordered])
    # Runs of neighbours to place, or nodes to close; a stack, since a chain of beginnings may be long.
    stack: list[tuple[int, int, int] | _Open] = [(0, len(ordered), 0)]
    while stack:
        item = stack.pop()
        if isinstance(item, _Open):
            builder.close(item)
            continue
        first, last, depth = item
        if last - first == 1:
            builder.leaf(first, depth)
            continue
        least = min(shared[first : last - 1])
        if (least - depth) * (last - first - 1) >= MIN_SHARED:
            stack.append(builder.open(first, last, depth, least))
            depth = least
        bounds = [first, *(i + 1 for i in range(first, last - 1) if shared[i] == least), last]
        stack.extend((a, b, depth) for a, b in reversed(list(pairwise(bounds))))
    return builder.forest(ordered, order)


@dataclass(frozen=True, slots=True)
class _Open:
    number: int


class _Builder:
    def __init__(self, lengths: Sequence[int]) -> None:
        self._nodes: list[Node | None] = []
        self._starts: list[tuple[int, int]] = []
        self._parts: list[tuple[int, int, int]] = []  # (a sequence that has these tokens, from, to)
        self._places = [np.zeros(length, dtype=np.int32) for length in lengths]
        self._end = 0

    def open(self, first: int, last: int, depth: int, to: int) -> _Open:
        start = self._add(range(first, last), depth, to)
        self._starts.append((start, self._end))
        self._nodes.append(None)
        return _Open(len(self._nodes) - 1)

    def close(self, opened: _Open) -> None:
        self._nodes[opened.number] = Node(*self._starts[opened.number], self._end)

    def leaf(self, item: int, depth: int) -> None:
        length = len(self._places[item])
        if length > depth:
            start = self._add([item], depth, length)
            self._starts.append((start, self._end))
            self._nodes.append(Node(start, self._end, self._end))

    def _add(self, items: Sequence[int], depth: int, to: int) -> int:
        start = self._end
        for item in items:
            self._places[item][depth:to] = np.arange(start, start + to - depth)
        self._parts.append((items[0], depth, to))
        self._end += to - depth
        return start

    def forest(self, ordered: Sequence[Int32Array], order: Sequence[int]) -> PrefixForest:
        places = dict(zip(order, self._places, strict=True))
        return PrefixForest(
            np.concatenate([ordered[item][depth:to] for item, depth, to in self._parts]),
            np.concatenate([np.arange(depth, to, dtype=np.int32) for _, depth, to in self._parts]),
            tuple(node for node in self._nodes if node is not None),
            tuple(places[index] for index in range(len(order))),
        )
