"""Fit the simulated engine's batching to a real one, and say how far off it is on loads that it was not fitted to.

Prints `policy.simulated.batching` as YAML; last line: one JSON object. The fit is over generations that begin together,
in batches of several sizes, and over prompts with a long shared prefix; what is predicted is other batches, other
lengths, requests that arrive at random, and episodes whose history grows.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import yaml
from harness import calibrate, report

from raygym.actors import serving
from raygym.batching_config import BatchingConfig
from raygym.config import PolicyConfig
from raygym.models import resolve_policy
from raygym.simulated_batching import BatchedRequest, ContinuousBatching
from raygym.stop_tokens import stop_token_ids
from raygym.types import Int32Array, Sampling

COSTS = ("step_s", "request_s", "kv_token_s", "prefill_token_s")
MAX_MODEL_LEN = 1024
_VOCABULARY = (100, 40_000)


@dataclass(frozen=True)
class Episode:
    """One or more turns, each of which continues the tokens of the one before."""

    start_s: float
    prompts: list[Int32Array]
    """For each turn, the tokens that are new before it."""
    max_tokens: list[int]


@dataclass
class Turn:
    """One generation as it was measured."""

    prompt: Int32Array
    answer: Int32Array
    seconds: float


@dataclass
class Played:
    """A load as it was measured."""

    episodes: list[Episode]
    turns: list[list[Turn]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def latencies_s(self) -> list[float]:
        """Of all turns, episode by episode."""
        return [turn.seconds for turns in self.turns for turn in turns]


def main() -> None:
    """Measure, fit, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition, batches of at most 16")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as policy.model; tiny costs so little that "
                        "the overhead around the engine is what is measured")  # fmt: skip
    options = parser.parse_args()
    calibrate()
    model_dir = resolve_policy(options.model)
    config = PolicyConfig(model=options.model, vllm={"max_model_len": MAX_MODEL_LEN})
    config = serving.with_engine_defaults(config, str(model_dir))
    os.environ.update(serving.engine_environment(config))
    # After the environment is set, which vLLM reads when it is imported.
    from raygym.actors.vllm_engine import VLLMEngine

    async def measured() -> tuple[dict[str, Any], list[dict[str, Played]], list[dict[str, Played]]]:
        engine = VLLMEngine(str(model_dir), options.model, stop_token_ids(model_dir), config.vllm)
        try:
            await engine.set_version(0)
            await play(engine, together(np.random.default_rng(99), 4, 32, 8))
            fitted, held_out = [], []
            for repetition in range(1 if options.quick else 3):
                fitted.append(await play_all(engine, fit_loads(options.quick), repetition))
                held_out.append(await play_all(engine, held_out_loads(options.quick), repetition))
            return limits(engine), fitted, held_out
        finally:
            engine.shutdown()

    batch_limits, fitted, held_out = asyncio.run(measured())
    loads = [load for loads in fitted for load in loads.values()]
    costs = fit(batch_limits, loads)
    model = BatchingConfig(**batch_limits, **costs)
    print(yaml.safe_dump({"batching": model.model_dump()}, sort_keys=False))
    # In units in which four digits after the point say enough.
    units = {"step_ms": "step_s", "request_ms": "request_s", "kv_1000_tokens_ms": "kv_token_s"}
    units["prefill_token_ms"] = "prefill_token_s"
    samples = {key: [costs[cost] * (1e6 if "1000" in key else 1e3)] for key, cost in units.items()}
    samples["prefix_hit_share"] = [predict(model, loads["episodes"])[2] for loads in held_out]
    for part, repetitions in (("fitted", fitted), ("held_out", held_out)):
        for key, values in errors(model, repetitions).items():
            samples[f"{part}_{key}"] = values
    for name in held_out[0]:
        one = [{name: loads[name]} for loads in held_out]
        for key, values in errors(model, one).items():
            samples[f"{name}_{key}"] = values
    threads = os.environ.get("OMP_NUM_THREADS", "?")
    report("calibrate_simulated", samples, config=f"{options.model}, {threads} threads, {config.vllm}")


def fit_loads(quick: bool) -> dict[str, Callable[[np.random.Generator], list[Episode]]]:
    """What the costs are fitted to."""
    loads: dict[str, Callable[[np.random.Generator], list[Episode]]] = {
        f"batch_{size}": lambda rng, size=size, length=length: together(rng, size, 24, length)  # type: ignore[misc]
        for size, length in ((1, 32), (4, 32), (16, 24), (64, 16))
        if not quick or size <= 16
    }
    loads["long_prompts"] = lambda rng: together(rng, 4, 400, 8)
    loads["shared_prefix"] = lambda rng: together(rng, 12, 16, 16, prefix=512)
    return loads


def held_out_loads(quick: bool) -> dict[str, Callable[[np.random.Generator], list[Episode]]]:
    """What is predicted: none of these sizes, lengths and arrivals were fitted."""
    return {
        "batch_8": lambda rng: together(rng, 8, 64, 40),
        "batch_32": lambda rng: together(rng, 12 if quick else 32, 48, 20),
        "arrivals": lambda rng: arrivals(rng, 12 if quick else 32, per_s=2.0),
        "episodes": lambda rng: episodes(rng, 4 if quick else 12, turns=4),
    }


def together(rng: np.random.Generator, size: int, prompt: int, length: int, prefix: int = 0) -> list[Episode]:
    """So many generations at once; their prompts may begin alike."""
    shared = random_tokens(rng, prefix)
    prompts = [np.concatenate([shared, random_tokens(rng, prompt)]) for _ in range(size)]
    return [Episode(0.0, [tokens], [length]) for tokens in prompts]


def arrivals(rng: np.random.Generator, number: int, per_s: float) -> list[Episode]:
    """Independent generations of random lengths, at random times."""
    starts = np.cumsum(rng.exponential(1 / per_s, number))
    return [
        Episode(float(start), [random_tokens(rng, int(rng.integers(16, 200)))], [int(rng.integers(4, 48))])
        for start in starts
    ]


def episodes(rng: np.random.Generator, number: int, turns: int) -> list[Episode]:
    """Multi-turn episodes of one task each four, which begin alike."""
    first: list[Int32Array] = []
    found = []
    for index in range(number):
        if index % 4 == 0:
            first = [random_tokens(rng, 120)]
        rest = [random_tokens(rng, int(rng.integers(10, 40))) for _ in range(turns - 1)]
        found.append(Episode(0.0, first + rest, [int(rng.integers(8, 32)) for _ in range(turns)]))
    return found


def random_tokens(rng: np.random.Generator, number: int) -> Int32Array:
    """Ordinary token IDs."""
    return rng.integers(*_VOCABULARY, number).astype(np.int32)


async def play_all(
    engine: Any, loads: Mapping[str, Callable[[np.random.Generator], list[Episode]]], repetition: int
) -> dict[str, Played]:
    """One load after the other, each with new prompts."""
    played = {}
    for index, (name, load) in enumerate(loads.items()):
        played[name] = await play(engine, load(np.random.default_rng([repetition, index, len(loads)])))
        at_once = len(played[name].turns)
        print(f"  {name}: {at_once} episodes in {played[name].seconds:.2f} s", file=sys.stderr, flush=True)
    return played


async def play(engine: Any, load: list[Episode]) -> Played:
    """Run a load on the real engine."""
    began = time.perf_counter()

    async def one(number: int, episode: Episode) -> list[Turn]:
        await asyncio.sleep(episode.start_s)
        turns, history = [], np.empty(0, np.int32)
        for turn, (new, max_tokens) in enumerate(zip(episode.prompts, episode.max_tokens, strict=True)):
            prompt = np.concatenate([history, new]).astype(np.int32)
            sampling = Sampling(temperature=1.0, max_tokens=max_tokens, seed=number)
            asked = time.perf_counter()
            generation = await engine.generate(prompt, sampling, f"{began}-{number}-{turn}")
            turns.append(Turn(prompt, generation.token_ids, time.perf_counter() - asked))
            history = np.concatenate([prompt, generation.token_ids])
        return turns

    turns = await asyncio.gather(*(one(number, episode) for number, episode in enumerate(load)))
    return Played(load, list(turns), time.perf_counter() - began)


def limits(engine: Any) -> dict[str, Any]:
    """The batch's limits as the real engine has them."""
    config = engine._llm.vllm_config
    return {
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
        "kv_blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
    }


def predict(model: BatchingConfig, load: Played) -> tuple[list[float], float, float]:
    """Turn latencies in the order of `Played.latencies_s`, the time of all, and the share of prefix hits."""
    batch = ContinuousBatching(model)
    turns = [list(turns) for turns in load.turns]
    latencies: list[list[float]] = [[] for _ in turns]
    running: dict[BatchedRequest, tuple[int, float]] = {}
    # (when, which episode) begins its next turn.
    asks = sorted((episode.start_s, number) for number, episode in enumerate(load.episodes))
    now_s = 0.0
    while asks or running:
        due_s = batch.next_event_s()
        now_s = min(t for t in (due_s, asks[0][0] if asks else None) if t is not None)
        for request in batch.advance(now_s):
            number, asked_s = running.pop(request)
            latencies[number].append(now_s - asked_s)
            if len(latencies[number]) < len(turns[number]):
                asks.insert(0, (now_s, number))
        while asks and asks[0][0] <= now_s:
            _, number = asks.pop(0)
            turn = turns[number][len(latencies[number])]
            running[batch.submit(now_s, turn.prompt, turn.answer)] = number, now_s
    hits = batch.prefix_hit_tokens / batch.prompt_tokens
    return [latency for episode in latencies for latency in episode], now_s, hits


def fit(batch_limits: Mapping[str, Any], loads: Sequence[Played]) -> dict[str, float]:
    """Costs with the least sum of relative errors of turn latencies, none below 0.

    Who is in which step does not depend on the costs where all begin together, so latencies are linear in the costs:
    predicting with one cost at a time gives the coefficients. The sum of absolute errors, by reweighted least squares,
    since on a shared machine a few turns take far too long.
    """
    measured_N = np.concatenate([load.latencies_s for load in loads])
    base = {"step_s": 1.0}
    columns = []
    for cost in COSTS:
        model = BatchingConfig(**batch_limits, **base | {cost: 1.0})
        columns.append(np.concatenate([predict(model, load)[0] for load in loads]))
    steps_N = columns[0]
    # Each load counts the same, however many turns it has.
    share_N = np.concatenate([np.full(len(load.latencies_s), 1 / len(load.latencies_s)) for load in loads])
    coefficients_NC = np.stack([steps_N, *(column - steps_N for column in columns[1:])], axis=1) / measured_N[:, None]
    used = list(range(len(COSTS)))
    while True:
        part_NC, weights_N = coefficients_NC[:, used], share_N
        for _ in range(50):
            root_N = np.sqrt(weights_N)
            solution_C, *_ = np.linalg.lstsq(part_NC * root_N[:, None], root_N, rcond=None)
            weights_N = share_N / np.maximum(np.abs(part_NC @ solution_C - 1), 1e-3)
        if solution_C.min() >= 0:
            break
        used.pop(int(np.argmin(solution_C)))
    found = dict.fromkeys(COSTS, 0.0) | {COSTS[c]: float(v) for c, v in zip(used, solution_C, strict=True)}
    return {cost: float(f"{max(value, 1e-9 if cost == 'step_s' else 0.0):.3g}") for cost, value in found.items()}


def errors(model: BatchingConfig, repetitions: Sequence[Mapping[str, Played]]) -> dict[str, list[float]]:
    """Relative errors of turn latencies and of throughput (median over the loads), one for each repetition."""
    found: dict[str, list[float]] = {}
    for loads in repetitions:
        latency, throughput = [], []
        for load in loads.values():
            latencies, seconds, _ = predict(model, load)
            measured = np.asarray(load.latencies_s)
            latency.append(np.abs(np.asarray(latencies) - measured) / measured)
            # Tokens are the same, so throughputs are as times are, the other way round.
            throughput.append(abs(load.seconds / seconds - 1))
        all_latency = np.concatenate(latency)
        found.setdefault("latency_error_median", []).append(float(np.median(all_latency)))
        found.setdefault("latency_error_p90", []).append(float(np.percentile(all_latency, 90)))
        found.setdefault("throughput_error", []).append(median(throughput))
    return found


if __name__ == "__main__":
    main()
