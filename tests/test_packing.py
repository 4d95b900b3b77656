import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.packing import assign_micro_batches, pack
from raygym.types import TrainSequence

lengths_strategy = st.lists(st.integers(1, 300), max_size=60)


def make_sequence(length: int, seed: int, trained: float = 0.3) -> TrainSequence:
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < trained
    mask[0] = False
    logprobs = np.where(mask, -rng.random(length) * 5, 0).astype(np.float32)
    return TrainSequence.uniform(rng.integers(3, 250, length, dtype=np.int32), mask, logprobs, float(rng.normal()))


def cells(lengths: list[int], indices: tuple[int, ...]) -> int:
    return pack([make_sequence(lengths[index], index) for index in indices]).num_cells if indices else 0


@given(lengths_strategy, st.integers(1, 5), st.integers(1, 1000))
@settings(deadline=None, max_examples=examples(30, 60))
def test_every_sequence_once_same_count_within_budget(lengths: list[int], num_ranks: int, budget: int) -> None:
    ranks = assign_micro_batches(lengths, num_ranks, budget)
    assert len(ranks) == num_ranks
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) >= 1
    for batch in (batch for rank in ranks for batch in rank):
        alone_and_long = len(batch) == 1 and lengths[batch[0]] > budget
        assert alone_and_long or cells(lengths, batch) <= budget


@given(lengths_strategy, st.integers(1, 5))
def test_ranks_are_balanced_by_tokens(lengths: list[int], num_ranks: int) -> None:
    ranks = assign_micro_batches(lengths, num_ranks, 512)
    loads = [sum(lengths[index] for batch in rank for index in batch) for rank in ranks]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_no_rank_has_an_empty_micro_batch_before_a_full_one() -> None:
    ranks = assign_micro_batches([500, 20, 20, 20, 20], 2, 100)
    for rank in ranks:
        full = [bool(batch) for batch in rank]
        assert full == sorted(full, reverse=True)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6, 1.0])
def test_padding_is_small(spread: float) -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(200), spread, 64), 16, 2048).astype(int).tolist()
    ranks = assign_micro_batches(lengths, 2, 4096)
    total = sum(cells(lengths, batch) for rank in ranks for batch in rank)
    assert 1 - sum(lengths) / total < 0.05


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12))
@settings(deadline=None)
def test_pack_keeps_every_token_and_restarts_positions(lengths: list[int]) -> None:
    sequences = [make_sequence(length, seed) for seed, length in enumerate(lengths)]
    batch = pack(sequences)
    assert batch.num_tokens == batch.num_computed == sum(lengths)
    ids, positions = batch.input_ids_BL.flatten().tolist(), batch.position_ids_BL.flatten().tolist()
    starts = [cell for cell, position in enumerate(positions) if position == 0]
    left = [sequence.token_ids.tolist() for sequence in sequences]
    for start in starts:
        found = next(each for each in left if ids[start : start + len(each)] == each)
        assert positions[start : start + len(found)] == list(range(len(found)))
        left.remove(found)
    assert not left


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12))
@settings(deadline=None)
def test_pack_predicts_each_trained_token_from_the_one_before(lengths: list[int]) -> None:
    sequences = [make_sequence(length, seed) for seed, length in enumerate(lengths)]
    batch, ordered = pack(sequences), sequences
    if not sum(s.loss_mask.sum() for s in sequences):
        return
    assert batch.mask_N.all()
    assert torch.equal(batch.input_ids_BL.flatten()[batch.positions_N + 1], batch.target_ids_N)
    assert (batch.position_ids_BL.flatten()[batch.positions_N + 1] > 0).all(), "predicted across sequences"
    np.testing.assert_array_equal(batch.target_ids_N, np.concatenate([s.token_ids[s.loss_mask] for s in ordered]))
    np.testing.assert_array_equal(batch.behaviour_N, np.concatenate([s.logprobs[s.loss_mask] for s in ordered]))
    advantages = np.concatenate([s.advantages[s.loss_mask] for s in ordered])
    np.testing.assert_array_equal(batch.advantages_N, advantages)
    counts = [int(s.loss_mask.sum()) for s in ordered if s.loss_mask.any()]
    assert torch.unique_consecutive(batch.sequence_N, return_counts=True)[1].tolist() == counts
    assert len(batch.sequence_N.unique()) == len(counts) and batch.sequence_N.max() < len(batch.sequence_N)


@pytest.mark.parametrize("sequences", [[], [make_sequence(5, 0, trained=0.0)], [make_sequence(1, 0)]])
def test_a_batch_without_trained_tokens_still_predicts_one_of_weight_zero(sequences: list[TrainSequence]) -> None:
    batch = pack(sequences)
    assert batch.mask_N.tolist() == [False]
    assert len(batch.positions_N) == len(batch.target_ids_N) == len(batch.behaviour_N) == len(batch.advantages_N) == 1
    assert batch.input_ids_BL.numel() >= 1


def test_training_the_first_token_is_refused() -> None:
    sequence = make_sequence(4, 0)
    sequence.loss_mask[0] = True
    with pytest.raises(AssertionError, match="first token"):
        pack([sequence])
