"""Sequences -> a forest: every token is where it should be, and sees what it should see."""

from __future__ import annotations

import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.prefix_forest import MIN_SHARED, build_forest, common_prefix, lexicographic
from raygym.types import Int32Array

# Few different tokens and pieces that repeat, so that beginnings are shared at several depths.
_PIECES = st.sampled_from([[1] * 20, [2] * 17, [1, 2] * 9, [3], [1], [300_000, 5]])
sequences_strategy = st.lists(
    st.lists(_PIECES, min_size=1, max_size=5).map(lambda parts: np.concatenate(parts).astype(np.int32)),
    min_size=1,
    max_size=12,
)


@given(sequences_strategy)
@settings(deadline=None, max_examples=examples(60, 200))
def test_every_sequence_is_in_the_row_at_its_places(sequences: list[Int32Array]) -> None:
    forest = build_forest(sequences)
    for ids, places in zip(sequences, forest.places, strict=True):
        np.testing.assert_array_equal(forest.token_ids_T[places], ids)
        np.testing.assert_array_equal(forest.positions_T[places], np.arange(len(ids)))
    used = set(np.concatenate(forest.places).tolist())
    assert used == set(range(len(forest.token_ids_T))), "the row has tokens that no sequence has"


@given(sequences_strategy)
@settings(deadline=None, max_examples=examples(60, 200))
def test_a_token_sees_exactly_what_is_before_it_in_its_sequences(sequences: list[Int32Array]) -> None:
    forest = build_forest(sequences)
    length = len(forest.token_ids_T)
    assert [node.start for node in forest.nodes] == [0, *(node.end for node in forest.nodes[:-1])]
    assert forest.nodes[-1].end == length
    seen = np.zeros((length, length), dtype=bool)
    for node in forest.nodes:
        for k in range(node.start, node.end):
            seen[k : node.subtree_end, k] = True
    expected = np.zeros_like(seen)
    for places in forest.places:
        for index, place in enumerate(places):
            expected[place, places[: index + 1]] = True
    np.testing.assert_array_equal(seen, expected)


@given(sequences_strategy)
@settings(deadline=None, max_examples=examples(60, 200))
def test_no_node_saves_less_than_it_costs(sequences: list[Int32Array]) -> None:
    forest = build_forest(sequences)
    for node in forest.nodes:
        users = sum(bool(np.isin(node.start, places)) for places in forest.places)
        identical = node.subtree_end == node.end  # equal sequences end together and need no child
        assert users == 1 or identical or (users - 1) * (node.end - node.start) >= MIN_SHARED


def test_a_prompt_is_there_once() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50_000, 512, dtype=np.int32)
    group = [np.concatenate([prompt, rng.integers(0, 50_000, 64, dtype=np.int32)]) for _ in range(8)]
    assert len(build_forest(group).token_ids_T) == 512 + 8 * 64


def test_a_long_chain_of_beginnings_needs_no_deep_stack() -> None:
    deep = sys.getrecursionlimit() + 200
    sequences = [np.ones(20 * n, dtype=np.int32) for n in range(1, deep + 1)]
    assert len(build_forest(sequences).token_ids_T) == 20 * deep


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=8))
def test_lexicographic_is_the_order_of_the_numbers(lists: list[list[int]]) -> None:
    arrays = [np.array(each, dtype=np.int32) for each in lists]
    assert [lists[index] for index in lexicographic(arrays)] == sorted(lists)


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(np.array(a, dtype=np.int32), np.array(b, dtype=np.int32)) == expected
