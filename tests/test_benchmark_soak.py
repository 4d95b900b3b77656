"""The arithmetic of the soak benchmark, without a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from soak import keys, slope_per_hour


def samples(values: list[float], every_s: float = 10.0) -> list[tuple[float, dict[str, float]]]:
    return [(index * every_s, {"fds": value}) for index, value in enumerate(values)]


def test_a_line_is_found_and_the_warm_up_is_not_part_of_it() -> None:
    growing = samples([1000.0] * 10 + [500.0 + index for index in range(40)])
    assert slope_per_hour(growing, "fds", 0.3) == pytest.approx(360)
    assert slope_per_hour(samples([500.0] * 40), "fds", 0.3) == pytest.approx(0, abs=1e-6)


def test_a_process_that_is_being_replaced_is_no_slope() -> None:
    values = [500.0] * 40
    values[20] = values[21] = 0.0
    assert slope_per_hour(samples(values), "fds", 0.1) == pytest.approx(0, abs=1e-6)


def test_too_little_is_no_slope_and_all_that_was_seen_is_reported() -> None:
    assert slope_per_hour(samples([3.0]), "fds", 0.5) == 0
    assert keys([(0, {"a": 1.0}), (1, {"b": 1.0})]) == ["a", "b"]
