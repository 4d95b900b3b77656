"""The learning rate against transformers' schedulers, and its bounds."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import make_sequence
from tiers import examples
from torch import Tensor
from transformers import get_scheduler

from raygym.learner_config import LearnerConfig
from raygym.learning_rate import learning_rate
from raygym.packing import MicroBatch
from raygym.update import PolicyUpdate

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


@settings(max_examples=examples(40, 100), deadline=None)
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


class RecordedRates:
    """A `TrainEngine` that learns nothing and keeps the rates of its steps."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(batch.target_ids_N), requires_grad=True), torch.zeros(len(batch.target_ids_N))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        self.rates.append(lr)
        return 0.0


def test_updates_that_go_on_later_have_the_rates_of_an_uninterrupted_run() -> None:
    cfg = config("cosine", 3, 1e-6).model_copy(update={"mini_batches": 2})
    batch = [make_sequence(8, seed) for seed in range(4)]
    whole, before, after = RecordedRates(), RecordedRates(), RecordedRates()
    update = PolicyUpdate(cfg, whole, 1.0, total_updates=10)
    reported = [update.run(batch)["lr"] for _ in range(5)]
    first = PolicyUpdate(cfg, before, 1.0, total_updates=10)
    for _ in range(2):
        first.run(batch)
    second = PolicyUpdate(cfg, after, 1.0, total_updates=10)
    second.updates = first.updates
    for _ in range(3):
        second.run(batch)
    assert before.rates + after.rates == whole.rates
    assert whole.rates == [learning_rate(cfg, number, 10) for number in range(10)]
    assert reported == whole.rates[1::2], "what is told is the rate of the step's last update"
