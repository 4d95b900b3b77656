"""The learning rate against transformers' schedulers, and its bounds."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from raygym.learner_config import LearnerConfig
from raygym.learning_rate import learning_rate

SCHEDULES = ["constant", "linear", "cosine"]


def config(schedule: str, warmup: int, lr_min: float = 0.0) -> LearnerConfig:
    return LearnerConfig(lr=2e-5, warmup_steps=warmup, lr_schedule=schedule, lr_min=lr_min)


@pytest.mark.parametrize(
    ("schedule", "theirs", "lr_min"),
    [("linear", "linear", 0.0), ("cosine", "cosine", 0.0), ("cosine", "cosine_with_min_lr", 3e-6)],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_after_the_warmup_it_is_what_transformers_has(schedule: str, theirs: str, lr_min: float, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    options = {"scheduler_specific_kwargs": {"min_lr": lr_min}} if lr_min else {}
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20, **options)
    for update in range(20):
        if update >= warmup:
            expected = scheduler.get_last_lr()[0]
            assert learning_rate(config(schedule, warmup, lr_min), update, 20) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warmup_is_linear_and_reaches_the_peak(schedule: str) -> None:
    found = [learning_rate(config(schedule, 4), update, 20) for update in range(5)]
    assert found == pytest.approx([5e-6, 1e-5, 1.5e-5, 2e-5, 2e-5])


@settings(max_examples=100, deadline=None)
@given(
    schedule=st.sampled_from(["linear", "cosine"]),
    warmup=st.integers(0, 20),
    more=st.integers(1, 50),
    share=st.floats(0, 1),
)
def test_it_falls_from_lr_towards_lr_min_and_every_update_moves(
    schedule: str, warmup: int, more: int, share: float
) -> None:
    cfg, total = config(schedule, warmup, share * 2e-5), warmup + more
    rates = [learning_rate(cfg, update, total) for update in range(total)]
    assert all(0 < rate <= 2e-5 * (1 + 1e-12) for rate in rates)
    falling = rates[warmup:]
    assert falling[0] == pytest.approx(2e-5)
    assert all(later <= earlier for earlier, later in pairwise(falling))
    assert learning_rate(cfg, total, total) == pytest.approx(cfg.lr_min, abs=1e-20)
    assert learning_rate(cfg, total + 1000, total) == pytest.approx(cfg.lr_min, abs=1e-20), "it stays there"


def test_a_falling_schedule_wants_to_know_the_end() -> None:
    assert learning_rate(config("constant", 2), 7) == 2e-5
    with pytest.raises(ValueError, match="lr_schedule: cosine falls until the last update"):
        learning_rate(config("cosine", 2), 7)
