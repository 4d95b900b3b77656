"""The bounds that benchmarks divide by."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    return importlib.import_module("harness.ideal")


def test_a_batch_takes_as_long_as_its_longest_place(ideal: ModuleType) -> None:
    assert ideal.makespan_s([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert ideal.makespan_s([1.0, 2.0], 8) == 2.0
    assert ideal.makespan_s([1.0, 2.0, 3.0], 1) == 6.0


def test_a_stream_fills_every_place_and_is_never_slower_than_a_batch(ideal: ModuleType) -> None:
    durations = [5.0, 1.0, 1.0, 1.0]
    assert ideal.steady_s(durations, 4) == 2.0
    assert all(ideal.steady_s(durations, n) <= ideal.makespan_s(durations, n) for n in range(1, 6))
