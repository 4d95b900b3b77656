"""The simulated engine on an event loop: its time, its faults, and what episodes make of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_episode import Talk, episode, renderer  # noqa: F401 - a fixture
from virtual_time import virtually

from raygym.chat import ChatRenderer
from raygym.config import ConfigError, PolicyConfig
from raygym.config_file import load_config
from raygym.engine import EngineError
from raygym.engine_options import check_engine_options
from raygym.latency_profile import MeasuredLatency
from raygym.simulate import SimulatedConfig, SimulatedEngine, draw_latency_s, generator
from raygym.simulated_faults import SimulatedFault
from raygym.types import EngineLoad, EpisodeStatus, FailureKind, Generation, Int32Array, Sampling, Trajectory

BATCHING = {"step_s": 0.01, "max_num_seqs": 4}


def engine(may_die: Callable[[], bool] = lambda: True, **config: Any) -> SimulatedEngine:
    return SimulatedEngine(SimulatedConfig(**config), [2], may_die=may_die)


async def ask(simulated: SimulatedEngine, seed: int = 0, max_tokens: int = 8) -> Generation:
    return await simulated.generate(np.arange(20, dtype=np.int32), Sampling(1.0, max_tokens, seed), "r")


class TestBatching:
    def test_turns_take_the_batch_s_time_on_the_loop_s_clock(self) -> None:
        async def main() -> list[tuple[int, float]]:
            simulated, loop = engine(batching=BATCHING), asyncio.get_running_loop()

            async def one(seed: int) -> tuple[int, float]:
                return len((await ask(simulated, seed)).token_ids), loop.time()

            return await asyncio.gather(*(one(seed) for seed in range(3)))

        first, *others = virtually(main())
        assert first[1] == pytest.approx(0.01 * first[0])
        for length, ended_s in others:  # they came while the first one's first step ran
            assert ended_s == pytest.approx(0.01 * (1 + length))

    def test_tokens_are_those_of_an_engine_without_it(self) -> None:
        async def main(**config: Any) -> list[list[int]]:
            simulated = engine(**config)
            return [(await ask(simulated, seed)).token_ids.tolist() for seed in range(5)]

        plain = virtually(main())
        assert virtually(main(batching=BATCHING)) == plain
        assert virtually(main(batching=BATCHING, slow_rate=0.5)) == plain

    def test_a_cancelled_turn_frees_its_place(self) -> None:
        async def main() -> float:
            simulated = engine(batching={"step_s": 1.0, "max_num_seqs": 1})
            tasks = [asyncio.ensure_future(ask(simulated, seed, 50)) for seed in range(2)]
            await asyncio.sleep(0.5)
            assert simulated.batch is not None
            assert (simulated.batch.running, simulated.batch.waiting) == (1, 1)
            tasks[0].cancel()
            await asyncio.sleep(0)
            assert (simulated.batch.running, simulated.batch.waiting) == (0, 1)
            length = len((await tasks[1]).token_ids)
            assert (simulated.batch.running, simulated.batch.kv_usage) == (0, 0)
            return asyncio.get_running_loop().time() - length

        assert virtually(main()) == pytest.approx(1.0), "the step that ran, then one for each token"

    def test_a_turn_spans_versions_and_its_time_stands_still(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "v.safetensors")

        async def main() -> tuple[Generation, float]:
            simulated = engine(batching={"step_s": 1.0, "prefix_caching": False})
            turn = asyncio.ensure_future(ask(simulated, seed=3, max_tokens=50))
            await asyncio.sleep(3.5)
            await simulated.pause()
            await asyncio.sleep(10)
            await simulated.load_weights(str(tmp_path / "v.safetensors"), 4)
            await simulated.resume()
            return await turn, asyncio.get_running_loop().time()

        generation, ended_s = virtually(main())
        length = len(generation.token_ids)
        assert length > 4
        assert generation.weight_versions.tolist() == [0] * 3 + [4] * (length - 3)
        assert ended_s == pytest.approx(13.5 + length - 3)

    def test_what_new_weights_put_back_is_no_queue_and_history_is_still_cached(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "v.safetensors")

        async def main() -> tuple[EngineLoad, int, int]:
            simulated = engine(batching={"step_s": 1.0, "block_size": 4, "chunked_prefill": False})
            turn = asyncio.ensure_future(ask(simulated, seed=3, max_tokens=50))
            await asyncio.sleep(3.5)
            await simulated.pause()
            await simulated.load_weights(str(tmp_path / "v.safetensors"), 4)
            load = simulated.load()
            await simulated.resume()
            generation = await turn
            history = np.concatenate([np.arange(20, dtype=np.int32), generation.token_ids, np.ones(4, np.int32)])
            assert set(generation.weight_versions.tolist()) == {0, 4}
            assert simulated.batch is not None
            before = simulated.batch.prefix_hit_tokens
            await simulated.generate(history, Sampling(1.0, 4, 0), "r")
            return load, simulated.batch.prefix_hit_tokens - before, len(history)

        load, hits, length = virtually(main())
        assert (load.running, load.waiting) == (0, 0)
        assert length - 4 - 4 <= hits < length, "all whole blocks of the history"


class TestMeasuredTimes:
    def test_samples_are_drawn_equally_often(self) -> None:
        config = SimulatedConfig(measured={"samples_s": [0.3, 0.1, 0.2, 0.2]})
        drawn = Counter(draw_latency_s(config, generator(np.arange(3, dtype=np.int32), n, 0)) for n in range(2000))
        assert set(drawn) == {0.1, 0.2, 0.3}
        assert drawn[0.2] / 2000 == pytest.approx(0.5, abs=0.06)

    def test_quantiles_are_linear_between(self) -> None:
        profile = MeasuredLatency(quantiles_s={1: 3.0, 0: 1.0, 0.5: 2.0})
        assert [profile.at(share) for share in (0.0, 0.25, 0.5, 0.75)] == [1.0, 1.5, 2.0, 2.5]

    def test_a_file_is_as_good_as_what_is_in_it(self, tmp_path: Path) -> None:
        path = tmp_path / "times.yaml"
        path.write_text("samples_s: [0.5]\n")
        config = SimulatedConfig(measured=str(path))
        assert config.model_dump(exclude_unset=True) == {"measured": {"samples_s": [0.5]}}
        assert virtually(seconds(config)) == 0.5
        path.write_text("{step_s: 0.02, max_num_seqs: 8}")
        assert (
            SimulatedConfig(batching=str(path)).batching
            == SimulatedConfig(batching={"step_s": 0.02, "max_num_seqs": 8}).batching
        )


async def seconds(config: SimulatedConfig) -> float:
    began_s = asyncio.get_running_loop().time()
    await ask(SimulatedEngine(config, [2]))
    return asyncio.get_running_loop().time() - began_s


@pytest.mark.parametrize(
    ("simulated", "words"),
    [
        ({"batching": {"step": 1}}, ["policy.simulated.batching.step:", "no such option", "step_s"]),
        ({"batching": {}}, ["policy.simulated.batching.step_s", "required"]),
        ({"batching": {"step_s": 0.1, "kv_blocks": 8}}, ["batching.kv_blocks", "hold 128", "max_model_len 4096"]),
        ({"batching": {"step_s": 0.1, "chunked_prefill": False, "max_num_batched_tokens": 256}}, ["256", "4096"]),
        ({"batching": {"step_s": 0.1}, "turn_latency_s": 1}, ["turn_latency_s", "beside batching"]),
        ({"measured": {"samples_s": [1]}, "latency_sigma": 1}, ["latency_sigma", "beside measured"]),
        ({"measured": {}}, ["policy.simulated.measured", "samples_s or quantiles_s"]),
        ({"measured": {"quantiles_s": {0: 1, 0.9: 2}}}, ["quantiles_s", "from 0 to 1, found 0 to 0.9"]),
        ({"measured": {"quantiles_s": {0: 2, 1: 1}}}, ["quantiles_s", "smaller time"]),
        ({"measured": "nowhere.yaml"}, ["policy.simulated.measured", "nowhere.yaml", "cannot be read"]),
        ({"measured": __file__}, ["policy.simulated.measured", "not valid YAML"]),
        ({"die_after_turns": 0}, ["policy.simulated.die_after_turns", "greater than or equal to 1"]),
    ],
)
def test_config_errors_are_for_people(simulated: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_options(PolicyConfig(model="tiny", engine="simulated", simulated=simulated))
    for word in words:
        assert word in str(caught.value)


class TestFaults:
    def test_slow_ones_take_their_factor(self) -> None:
        async def main(**config: Any) -> list[float]:
            simulated, loop, times = engine(**config), asyncio.get_running_loop(), []
            for seed in range(40):
                began_s = loop.time()
                await ask(simulated, seed)
                times.append(round(loop.time() - began_s, 6))
            return times

        times = Counter(virtually(main(turn_latency_s=0.5, slow_rate=0.3, slow_factor=7)))
        assert set(times) == {0.5, 3.5} and 4 <= times[3.5] <= 20
        assert virtually(main(turn_latency_s=0.5, slow_rate=0.3, slow_factor=7)) == virtually(
            main(turn_latency_s=0.5, slow_rate=0.3, slow_factor=7)
        ), "the same ones each time"

    async def test_a_death_takes_all_with_it(self) -> None:
        simulated = engine(die_after_turns=3, turn_latency_s=30)
        turns = [asyncio.ensure_future(ask(simulated, seed)) for seed in range(3)]
        for turn in turns:
            with pytest.raises(EngineError, match="died at turn 3"):
                await asyncio.wait_for(turn, 5)
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(ask(simulated), 5)
        with pytest.raises(EngineError, match="die_after_turns"):
            await simulated.check_health()

    async def test_a_successor_lives_when_no_death_is_left(self) -> None:
        deaths = iter([True, False])
        first, second = (engine(lambda: next(deaths), die_after_turns=1) for _ in range(2))
        with pytest.raises(EngineError):
            await ask(first)
        assert len((await ask(second)).token_ids) and len((await ask(second)).token_ids)
        await second.check_health()

    async def test_giving_up_is_no_death(self) -> None:
        simulated = engine(die_after_turns=99, batching={"step_s": 30.0})
        turn = asyncio.ensure_future(ask(simulated))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert simulated.batch is not None and simulated.batch.running == 1
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert simulated.batch.running == 0
        await simulated.check_health()


class TestEpisodesOnFaults:
    """Whatever the engine does, an episode ends with the failure's name, and with no reward."""

    async def play(self, renderer: ChatRenderer, timeout_s: float = 5.0, **config: Any) -> list[Trajectory]:  # noqa: F811
        simulated = engine(**config)

        def generate(number: int) -> Any:
            async def call(prompt: Int32Array, sampling: Sampling, session_id: str) -> Generation:
                return await simulated.generate(prompt, Sampling(1.0, 8, number), session_id)

            return call

        return await asyncio.gather(
            *(episode(renderer, Talk(), generate(number), turn_timeout_s=timeout_s) for number in range(12))
        )

    @pytest.mark.parametrize(
        ("config", "kinds"),
        [
            ({"error_rate": 1}, {FailureKind.ENGINE_ERROR}),
            ({"hang_rate": 1, "timeout_s": 0.1}, {FailureKind.ENGINE_TIMEOUT}),
            ({"slow_rate": 1, "turn_latency_s": 0.05, "timeout_s": 0.1}, {FailureKind.ENGINE_TIMEOUT}),
            ({"garbage_rate": 1}, {FailureKind.ENGINE_ERROR, FailureKind.INVALID_LOGPROBS}),
            ({"die_after_turns": 1}, {FailureKind.ENGINE_ERROR}),
            ({"die_after_turns": 5, "turn_latency_s": 0.05}, {FailureKind.ENGINE_ERROR}),
            ({"batching": {"step_s": 0.5}, "timeout_s": 0.1}, {FailureKind.ENGINE_TIMEOUT}),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    async def test_each_has_its_kind(self, renderer: ChatRenderer, config: Any, kinds: set[FailureKind]) -> None:  # noqa: F811
        trajectories = await self.play(renderer, **config)
        assert {trajectory.failure for trajectory in trajectories} == kinds
        assert {trajectory.reward for trajectory in trajectories} == {0.0}

    async def test_what_is_fine_has_its_reward(self, renderer: ChatRenderer) -> None:  # noqa: F811
        trajectories = await self.play(renderer, garbage_rate=0.2, error_rate=0.1, batching={"step_s": 0.001})
        failed = [trajectory for trajectory in trajectories if trajectory.status is EpisodeStatus.FAILED]
        assert 0 < len(failed) < 12 and {trajectory.reward for trajectory in failed} == {0.0}
        assert {t.reward for t in trajectories if t.status is EpisodeStatus.TERMINATED} == {0.5}


def test_the_shipped_preset_is_a_config_of_this_engine() -> None:
    config = load_config(Path(__file__).parent.parent / "configs" / "simulated_smollm2_cpu.yaml")
    check_engine_options(config.policy)
    assert SimulatedConfig(**config.policy.simulated).batching is not None


async def test_a_fault_has_its_name() -> None:
    with pytest.raises(SimulatedFault, match="error_rate"):
        await ask(engine(error_rate=1))
