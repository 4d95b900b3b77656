"""What a learner's process is started with; nothing is started here."""

from __future__ import annotations

from typing import Any

import pytest

from raygym.actors.learner_group import rank_environment
from raygym.config import LearnerConfig

NOT_CACHED = "glibc.cpu.x86_non_temporal_threshold=0x80000"
CPU = {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "GLIBC_TUNABLES": NOT_CACHED}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_learners": 2}, {"OMP_NUM_THREADS": "4", **CPU}),
        ({"num_learners": 32}, {"OMP_NUM_THREADS": "1", **CPU}),
        ({"threads": 3}, {"OMP_NUM_THREADS": "3", **CPU}),
        ({"num_learners": 32, "gpus_per_learner": 1}, {}),
        ({"num_learners": 2, "gpus_per_learner": 1, "threads": 6}, {"OMP_NUM_THREADS": "6"}),
    ],
)
def test_the_drivers_cores_say_nothing_of_learners_on_gpus(changes: dict[str, Any], expected: dict[str, str]) -> None:
    assert rank_environment(LearnerConfig(**changes), cores=8) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("glibc.malloc.tcache_count=0", f"glibc.malloc.tcache_count=0:{NOT_CACHED}"),
        ("glibc.cpu.x86_non_temporal_threshold=0x4040", "glibc.cpu.x86_non_temporal_threshold=0x4040"),
    ],
)
def test_what_somebody_has_set_stays(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert rank_environment(LearnerConfig(), cores=8)["GLIBC_TUNABLES"] == expected
