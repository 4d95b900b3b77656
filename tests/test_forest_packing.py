from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import make_sequence
from tiers import examples

from raygym.forest_packing import assign_forests, pack_forest
from raygym.prefix_forest import build_forest
from raygym.types import Int32Array, TrainSequence


@st.composite
def groups(draw: st.DrawFn) -> list[Int32Array]:
    """Sequences of several groups, in any order; a group's share their prompt."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for prompt_length, answers in draw(
        st.lists(st.tuples(st.integers(1, 120), st.lists(st.integers(0, 60), min_size=1, max_size=6)), max_size=6)
    ):
        prompt = rng.integers(0, 9, prompt_length, dtype=np.int32)
        made += [np.concatenate([prompt, rng.integers(0, 9, n, dtype=np.int32)]) for n in answers]
    return [made[index] for index in rng.permutation(len(made))]


def computed(sequences: list[Int32Array]) -> int:
    return len(build_forest(sequences).token_ids_T) if sequences else 0


@given(groups(), st.integers(1, 5), st.integers(1, 400))
@settings(deadline=None, max_examples=examples(50, 150))
def test_every_sequence_once_same_count_within_budget(sequences: list[Int32Array], ranks: int, budget: int) -> None:
    shares = assign_forests(sequences, ranks, budget)
    assert len(shares) == ranks
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(sequences)))
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) >= 1
    for batch in (batch for share in shares for batch in share):
        alone_and_long = len(batch) == 1 and len(sequences[batch[0]]) > budget
        assert alone_and_long or computed([sequences[index] for index in batch]) <= budget


@given(groups(), st.integers(1, 5))
@settings(deadline=None, max_examples=examples(40, 100))
def test_no_rank_computes_more_than_its_part_and_one_sequence(sequences: list[Int32Array], ranks: int) -> None:
    shares = assign_forests(sequences, ranks, 10**9)
    loads = [sum(computed([sequences[index] for index in batch]) for batch in share) for share in shares]
    # What is not worth a node (fewer than 16 tokens saved by each sequence) is not in the plan.
    margin = 16 * len(sequences)
    assert max(loads) <= computed(sequences) / ranks + max(map(len, sequences), default=0) + margin


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_groups_stay_together_where_they_can(ranks: int) -> None:
    rng = np.random.default_rng(1)
    sequences = []
    for _ in range(8):
        prompt = rng.integers(0, 50_000, 300, dtype=np.int32)
        sequences += [np.concatenate([prompt, rng.integers(0, 50_000, 40, dtype=np.int32)]) for _ in range(8)]
    shares = assign_forests([sequences[i] for i in rng.permutation(64)], ranks, 4096)
    assert sum(len(batch) > 0 for share in shares for batch in share) <= 2 * ranks


@given(groups())
@settings(deadline=None, max_examples=examples(30, 60))
def test_pack_predicts_each_trained_token_from_the_one_before(token_ids: list[Int32Array]) -> None:
    sequences = []
    for seed, ids in enumerate(token_ids):
        made = make_sequence(len(ids), seed)
        sequences.append(TrainSequence(ids, made.loss_mask, made.logprobs, made.advantages))
    batch = pack_forest(sequences)
    if not any(sequence.loss_mask.any() for sequence in sequences):
        assert batch.mask_N.tolist() == [False]
        return
    flat_ids, flat_positions = batch.input_ids_BL.flatten(), batch.position_ids_BL.flatten()
    before = np.concatenate([s.token_ids[np.flatnonzero(s.loss_mask) - 1] for s in sequences])
    assert flat_ids[batch.positions_N].tolist() == before.tolist()
    where = np.concatenate([np.flatnonzero(s.loss_mask) - 1 for s in sequences])
    assert flat_positions[batch.positions_N].tolist() == where.tolist()
    np.testing.assert_array_equal(batch.target_ids_N, np.concatenate([s.token_ids[s.loss_mask] for s in sequences]))
    np.testing.assert_array_equal(batch.behaviour_N, np.concatenate([s.logprobs[s.loss_mask] for s in sequences]))
    counts = [int(s.loss_mask.sum()) for s in sequences if s.loss_mask.any()]
    assert torch.unique_consecutive(batch.sequence_N, return_counts=True)[1].tolist() == counts
    assert batch.num_cells == batch.num_computed <= batch.num_tokens == sum(map(len, token_ids))


def test_an_empty_batch_still_predicts_one_token_of_weight_zero() -> None:
    batch = pack_forest([])
    assert batch.mask_N.tolist() == [False] and batch.num_computed == 0
