"""The simulated engine at a weight update: its time stands still, and each token carries the version that made it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from virtual_time import virtually

from raygym.engine_clock import EngineClock
from raygym.simulate import SimulatedConfig, SimulatedEngine
from raygym.types import Generation, Sampling

PROMPT = np.asarray([5, 6, 7], np.int32)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4),
    st.integers(1, 20),
    st.integers(1, 8),
)
def test_pauses_take_no_time_and_part_the_tokens(pauses: list[tuple[int, int]], seconds: int, count: int) -> None:
    """Pauses as (seconds of work before it, its seconds); each ends with new weights."""

    async def play() -> None:
        clock, loop = EngineClock(), asyncio.get_running_loop()

        async def update() -> None:
            for version, (working_s, paused_s) in enumerate(pauses, 1):
                await asyncio.sleep(working_s)
                clock.pause()
                await asyncio.sleep(paused_s)
                clock.changed(version)
                clock.resume()

        updating = asyncio.ensure_future(update())
        await asyncio.sleep(0.5)  # so that the end never coincides with an update
        started, began_s = clock.now(), loop.time()
        await clock.sleep(seconds)
        took_s = loop.time() - began_s
        versions = clock.versions(started, seconds, count).tolist()
        await updating

        at_s = np.cumsum([working_s for working_s, _ in pauses]) - started.seconds
        meets = [paused_s for at, (_, paused_s) in zip(at_s, pauses, strict=True) if at < seconds]
        assert took_s == pytest.approx(seconds + sum(meets))
        for index, version in enumerate(versions):
            assert version == (at_s < seconds * (index + 1) / count).sum()

    virtually(play())


async def generate(
    engine: SimulatedEngine, path: Path, update_at_s: float | None, seed: int = 3
) -> tuple[Generation, float]:
    """One generation, with an update of 10 s that begins `update_at_s` after it; and how long it took."""
    loop = asyncio.get_running_loop()

    async def update() -> None:
        if update_at_s is not None:
            await asyncio.sleep(update_at_s)
            await engine.pause()
            await engine.load_weights(str(path), engine.weight_version + 1)
            await asyncio.sleep(10)
            await engine.resume()

    updating, began_s = asyncio.ensure_future(update()), loop.time()
    answer = await engine.generate(PROMPT, Sampling(max_tokens=64, seed=seed), "r")
    took_s = loop.time() - began_s
    await updating
    return answer, took_s


def test_a_turn_spans_an_update(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"a": torch.zeros(1)}, path)

    def play(update_at_s: float | None) -> tuple[Generation, float]:
        return virtually(generate(SimulatedEngine(SimulatedConfig(turn_latency_s=1.0), [2]), path, update_at_s))

    (whole, whole_s), (spans, spans_s), (again, _) = play(None), play(0.4), play(0.4)
    assert whole_s == pytest.approx(1.0)
    assert spans_s >= 11.0 - 1e-9, "the rest of the latency comes after the pause"
    old = spans.weight_versions == 0
    length = len(whole.token_ids)
    assert length > 10 and old.sum() == int(0.4 * length) and old[: old.sum()].all()
    assert np.array_equal(spans.token_ids[old], whole.token_ids[old])
    assert np.array_equal(spans.logprobs[old], whole.logprobs[old])
    assert not np.array_equal(spans.token_ids[~old], whole.token_ids[~old])
    assert (spans.weight_versions[~old] == 1).all()
    assert spans.finish_reason == whole.finish_reason and len(spans.token_ids) == length
    for name in ("token_ids", "logprobs", "weight_versions"):
        assert np.array_equal(getattr(again, name), getattr(spans, name)), "a function of its versions"


async def test_a_turn_of_no_latency_is_of_the_version_that_is_served(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    engine = SimulatedEngine(SimulatedConfig(), [2])
    await engine.pause()
    asked = asyncio.ensure_future(engine.generate(PROMPT, Sampling(seed=1), "r"))
    await asyncio.sleep(0)
    await engine.load_weights(str(path), 7)
    assert not asked.done()
    await engine.resume()
    assert set((await asked).weight_versions.tolist()) == {7}


def test_on_a_clock_of_whole_milliseconds_it_sleeps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As uvloop's, on which Ray's actors run: the rest of a millisecond would be slept through by spinning."""
    sleeps: list[float] = []
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        sleeps.append(seconds)
        await sleep(seconds)

    async def main() -> None:
        loop, clock = asyncio.get_running_loop(), EngineClock()
        exact = loop.time
        monkeypatch.setattr(loop, "time", lambda: int(exact() * 1000) / 1000)
        monkeypatch.setattr(asyncio, "sleep", counted)
        for _ in range(5):
            await clock.sleep(0.0103)

    asyncio.run(main())
    assert len(sleeps) <= 10, "one each, and another where the loop woke up a millisecond early"
