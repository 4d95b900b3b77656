"""`PolicyUpdate` on a real model: micro-batches, packing and ranks change nothing; which forward passes it makes."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from plain_engine import VOCAB, Gang, PlainEngine, tiny_llama
from test_corrections import ALLOWED
from test_packing import make_sequence

import raygym.update
from raygym import forest_attention
from raygym.config import LearnerConfig
from raygym.packing import pack
from raygym.policy_model import TokenLogprobs
from raygym.policy_packing import FOREST, ROWS, Packing
from raygym.types import LearnStats, TrainSequence
from raygym.update import PolicyUpdate

TEMPERATURE = 0.8
LENGTHS = [32, 25, 40, 29, 36, 27, 31, 23]
PROMPTS = np.random.default_rng(2).integers(3, VOCAB, (2, 20), dtype=np.int32)
"""What the sequences of two groups begin with."""
POLICY = tiny_llama()
REFERENCE = tiny_llama(seed=1)
# How long it took, and how much of the work was shared or padding.
_OF_THE_LAYOUT = {"seconds", "tokens_per_s", "padding_fraction", "shared_fraction"}

torch.set_num_threads(1)


def sequences() -> list[TrainSequence]:
    """Behaviour is the policy with noise; advantages differ from token to token. Two groups share their prompts."""
    made, rng = [], np.random.default_rng(3)
    model = TokenLogprobs(POLICY)
    for seed, length in enumerate(LENGTHS):
        sequence = make_sequence(length, seed, trained=0.7)
        ids, mask = (sequence.token_ids % VOCAB).astype(np.int32), sequence.loss_mask
        mask[-1] = True
        ids[:20], mask[:20] = PROMPTS[seed % 2], False
        sequence = TrainSequence.uniform(ids, mask, np.zeros(length, np.float32), 0.0)
        with torch.no_grad():
            own = model(pack([sequence]), TEMPERATURE)[0].numpy()
        logprobs, credit = np.zeros(length, np.float32), np.zeros(length, np.float32)
        logprobs[mask] = own + rng.normal(0, 0.3, mask.sum())
        credit[mask] = rng.normal(0, 1, mask.sum())
        made.append(replace(sequence, logprobs=logprobs, advantages=credit))
    return made


SEQUENCES = sequences()


def updated(
    config: LearnerConfig,
    ranks: int = 1,
    monkeypatch: pytest.MonkeyPatch | None = None,
    packing: Packing = ROWS,
    dtype: torch.dtype = torch.float64,
) -> tuple[LearnStats, list[torch.Tensor], PlainEngine]:
    gang = Gang(ranks) if ranks > 1 else None
    if gang is not None:
        assert monkeypatch is not None
        monkeypatch.setattr(raygym.update.dist, "all_reduce", gang.all_reduce)
    engines = [PlainEngine(copy.deepcopy(POLICY).to(dtype), TEMPERATURE, gang) for _ in range(ranks)]
    reference = TokenLogprobs(copy.deepcopy(REFERENCE).to(dtype)) if config.kl_coef else None
    if packing is FOREST:
        for policy in [engine.policy for engine in engines] + ([reference.policy] if reference else []):
            policy.set_attn_implementation(forest_attention.NAME)

    def one(rank: int) -> LearnStats:
        place: dict[str, Any] = {"rank": rank, "world_size": ranks, "packing": packing}
        update = PolicyUpdate(config, engines[rank], TEMPERATURE, reference=reference, **place)
        return update.run(SEQUENCES)

    stats = [one(0)] if gang is None else gang.run(one)
    for other in stats[1:]:
        assert other.keys() == stats[0].keys()
        assert all(other[key] == stats[0][key] for key in other.keys() - _OF_THE_LAYOUT), "ranks disagree"
    return stats[0], engines[0].gradients, engines[0]


def config(budget: int = 10_000, **keys: Any) -> LearnerConfig:
    defaults: dict[str, Any] = {"lr": 1e-2, "clip_low": 0.1, "clip_high": 0.15, "mini_batches": 2}
    return LearnerConfig(**{**defaults, "tokens_per_micro_batch": budget, **keys})


# Every loss and mean, each with another correction, so that each correction is met with several losses.
METHODS = [
    {**method, **({"kl_coef": 0.1, "entropy_coef": 0.05} if number % 8 else {})}
    for number, method in enumerate(ALLOWED)
    if number % 4 == 0
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("packing", [ROWS, FOREST], ids=lambda packing: packing.name)
def test_what_was_learned_from_is_told_by_sequence(
    ranks: int, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first of two mini-batches that is what the policy says before it learns."""
    gang = Gang(ranks) if ranks > 1 else None
    if gang is not None:
        monkeypatch.setattr(raygym.update.dist, "all_reduce", gang.all_reduce)
    engines = [PlainEngine(copy.deepcopy(POLICY).double(), TEMPERATURE, gang) for _ in range(ranks)]
    if packing is FOREST:
        for engine in engines:
            engine.policy.set_attn_implementation(forest_attention.NAME)

    def one(rank: int) -> list[dict[int, Any]]:
        update = PolicyUpdate(config(60), engines[rank], TEMPERATURE, packing=packing, rank=rank, world_size=ranks)
        before = update.token_logprobs(SEQUENCES)
        update.run(SEQUENCES)
        told = update.learned_logprobs()
        assert update.learned_logprobs() == {}
        return [before, told]

    answers = [one(0)] if gang is None else gang.run(one)
    before, told = ({i: t for answer in answers for i, t in answer[n].items()} for n in range(2))
    assert set(told) == {index for index, sequence in enumerate(SEQUENCES) if sequence.has_signal}
    first = {index for index in told if index < (len(SEQUENCES) + 1) // 2}
    assert first and first != set(told)
    for index in first:
        np.testing.assert_allclose(told[index], before[index], atol=1e-5)
    assert any(np.abs(told[index] - before[index]).max() > 1e-4 for index in set(told) - first)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(str(value) for value in method.values()))
def test_micro_batches_packing_and_ranks_change_nothing(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected, _ = updated(config(**method))
    assert len(expected) == 2 and all(gradient.norm() > 1e-3 for gradient in expected)
    alone = updated(config(1, **method))
    split = updated(config(60, **method))
    two_ranks = updated(config(60, **method), 2, monkeypatch)
    for stats, gradients, _ in (alone, split, two_ranks):
        for gradient, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * wanted.norm().item())
        for key in whole.keys() - _OF_THE_LAYOUT:
            assert stats[key] == pytest.approx(whole[key], rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize("method", METHODS[::3], ids=lambda method: "-".join(str(value) for value in method.values()))
def test_prompts_that_are_computed_once_change_nothing(method: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, wanted, _ = updated(config(**method))
    for stats, gradients, _ in (
        updated(config(**method), packing=FOREST),
        updated(config(100, **method), packing=FOREST),
        updated(config(100, **method), 2, monkeypatch, packing=FOREST),
    ):
        assert stats["shared_fraction"] > 0
        for gradient, want in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-6 * want.norm().item())
        for key in expected.keys() - _OF_THE_LAYOUT:
            assert stats[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key


def test_proximal_is_the_policy_before_the_step_in_all_mini_batches() -> None:
    """The second update's gradient, computed plainly: its ratio and weight are of the weights before the first one."""
    chosen = config(lr=0.3, correction="truncated_token", correction_cap=1.2, clip_low=0.5, clip_high=0.5)
    _, gradients, _ = updated(chosen)
    once = PlainEngine(POLICY, TEMPERATURE)
    PolicyUpdate(chosen.model_copy(update={"mini_batches": 1}), once, TEMPERATURE).run(SEQUENCES[:4])
    np.testing.assert_allclose(gradients[0], once.gradients[0], atol=1e-9)
    after, before, rest = TokenLogprobs(once.policy), TokenLogprobs(POLICY), SEQUENCES[4:]
    trained = sum(int(sequence.loss_mask.sum()) for sequence in rest)
    total = torch.zeros((), dtype=torch.float64)
    moved = 0.0
    for sequence in rest:
        batch = pack([sequence])
        with torch.no_grad():
            proximal = before(batch, TEMPERATURE)[0].double()
        current, credit = after(batch, TEMPERATURE)[0].double(), batch.advantages_N.double()
        moved = max(moved, (current - proximal).abs().max().item())
        weight = (proximal - batch.behaviour_N).exp().clamp(max=1.2)
        ratio = (current - proximal).exp()
        total = total - (weight * torch.minimum(ratio * credit, ratio.clamp(0.5, 1.5) * credit)).sum() / trained
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in once.policy.parameters() if p.grad is not None])
    assert moved > 0.05, "the first update moved nothing: nothing was told apart"
    np.testing.assert_allclose(gradients[1], plain, atol=1e-6 * plain.norm().item())


def test_a_forward_pass_is_made_only_where_the_algebra_needs_one() -> None:
    """With one micro-batch a mini-batch: M for M updates, and one more for each update after the first, if weighed."""
    for mini_batches in (1, 2, 4):
        for correction, more in (("none", 0), ("truncated_token", mini_batches - 1)):
            _, _, engine = updated(config(mini_batches=mini_batches, correction=correction))
            assert engine.forwards == mini_batches + more


def test_statistics_of_corrections() -> None:
    plain, _, _ = updated(config(mini_batches=1))
    assert plain["correction_fraction"] == 0 and plain["correction_weight"] == 1
    capped, _, _ = updated(config(mini_batches=1, correction="truncated_token", correction_cap=1.1))
    model = TokenLogprobs(POLICY)
    with torch.no_grad():
        ratios = np.concatenate(
            [(model(b, TEMPERATURE)[0] - b.behaviour_N).exp().numpy() for b in (pack([s]) for s in SEQUENCES)]
        )
    assert capped["correction_fraction"] == pytest.approx((ratios > 1.1).mean())
    assert capped["correction_weight"] == pytest.approx(np.minimum(ratios, 1.1).mean(), rel=1e-5)


def test_reference_logprobs_are_those_of_the_starting_policy_and_no_part_of_the_loss_then() -> None:
    chosen = config(kl_coef=0.5, kl_in="reward")
    engine, reference = PlainEngine(POLICY, TEMPERATURE), TokenLogprobs(REFERENCE)
    update = PolicyUpdate(chosen, engine, TEMPERATURE, reference=reference)
    found = update.reference_logprobs(SEQUENCES)
    for index, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            expected = reference(pack([sequence]), TEMPERATURE)[0]
        np.testing.assert_allclose(found[index][sequence.loss_mask], expected, atol=1e-6)
        assert not found[index][~sequence.loss_mask].any()
    stats = update.run(SEQUENCES)
    assert stats["reference_kl"] == 0
    _, gradients, _ = updated(config())
    np.testing.assert_allclose(engine.gradients[0], gradients[0], atol=1e-9)


def test_the_entropy_bonus_raises_entropy() -> None:
    without = [replace(s, advantages=np.zeros_like(s.advantages)) for s in SEQUENCES]
    engine = PlainEngine(POLICY, TEMPERATURE)
    update = PolicyUpdate(config(lr=1e-2, mini_batches=1, entropy_coef=1.0), engine, TEMPERATURE)
    entropies = [update.run(without)["entropy"] for _ in range(6)]
    assert all(later > earlier for earlier, later in pairwise(entropies))
