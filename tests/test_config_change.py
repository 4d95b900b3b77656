"""What differs between two configs, and which differences a run can go on with."""

from __future__ import annotations

import pytest

from raygym.config_change import changes


def test_changes_are_told_by_dotted_key() -> None:
    old = {"steps": 3, "learner": {"lr": 1e-6, "betas": [0.9, 0.95]}, "envs": [{"id": "a"}], "gone": 1}
    new = {"steps": 5, "learner": {"lr": 1e-5, "betas": [0.9, 0.99]}, "envs": [{"id": "a"}, {"id": "b"}]}
    assert [str(change) for change in changes(old, new)] == [
        "steps: 3 -> 5",
        "learner.lr: 1e-06 -> 1e-05",
        "learner.betas.1: 0.95 -> 0.99",
        "gone: 1 -> None",
        "envs.1.id: None -> b",
    ]
    assert changes(old, old) == []


@pytest.mark.parametrize(
    ("key", "harmless"),
    [
        ("steps", True),
        ("logging.tensorboard", True),
        ("checkpoint.every", True),
        ("learner.num_learners", True),
        ("learner.deepspeed.zero_optimization.stage", True),
        ("learner.update_timeout_s", True),
        ("rollout.turn_timeout_s", True),
        ("policy.http.port", True),
        ("validation.every", True),
        ("validation.tasks", False),
        ("learner.lr", False),
        ("learner.dtype", False),
        ("seed", False),
        ("policy.model", False),
        ("rollout.max_staleness", False),
        ("rollout.group_deadline_s", False),
        ("envs.0.kwargs.high", False),
        ("learner.something_new", False),
    ],
)
def test_only_what_changes_no_result_is_harmless(key: str, harmless: bool) -> None:
    parts = key.split(".")
    old, new = {}, {}
    for mapping, value in ((old, 1), (new, 2)):
        node = mapping
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    (change,) = changes(old, new)
    assert change.harmless is harmless


@pytest.mark.parametrize(
    "schedules", [("constant", "constant"), ("linear", "linear"), ("constant", "cosine"), (None, "linear")]
)
def test_steps_matter_to_a_rate_that_falls_until_the_last(schedules: tuple[str | None, str]) -> None:
    old, new = (
        {"steps": steps, "learner": {"lr_schedule": s} if s else {}} for steps, s in zip((3, 5), schedules, strict=True)
    )
    (change,) = (change for change in changes(old, new) if change.key == "steps")
    assert change.harmless is (schedules == ("constant", "constant"))
