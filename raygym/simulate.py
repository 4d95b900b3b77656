"""The simulated engine: latency without a model. For tests and for trying a config, never for a result.

Its tokens are a deterministic function of prompt, seed and weight version, so that runs repeat exactly. Its time is
drawn for each generation, or comes from a model of continuous batching (`simulated_batching.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from raygym.batched_generations import BatchedGenerations
from raygym.batching_config import BatchingConfig
from raygym.latency_profile import MeasuredLatency
from raygym.simulated_batching import ContinuousBatching
from raygym.simulated_faults import EngineLife, SimulatedFault, garbage
from raygym.types import Generation, Int32Array, Sampling
from raygym.weights import model_checksum, tensor_checksum


class SimulatedConfig(BaseModel):
    """`policy.simulated` of the run config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    turn_latency_s: float = Field(default=0.0, ge=0)
    """Mean time of a generation, whatever its length."""
    latency_sigma: float = Field(default=0.0, ge=0, le=4)
    """0: every generation takes the mean. Above: log-normal with that mean, and this deviation of the logarithm."""
    measured: MeasuredLatency | None = None
    """In place of the two above, times that were measured: a mapping, or the path of a YAML file with it."""
    batching: BatchingConfig | None = None
    """In place of all above, continuous batching: a mapping, or the path of a YAML file with it."""
    hang_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of generations that never end, chosen as the failing ones are."""
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of generations that fail, chosen by the same deterministic hash."""
    slow_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of generations that arrive late, chosen likewise."""
    slow_factor: float = Field(default=10.0, ge=1, allow_inf_nan=False)
    """A late one takes so many times its time. With `batching`, the rest of it is spent outside of the batch."""
    garbage_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of generations that cannot be used, chosen likewise: no tokens, a token ID below 0, or a NaN logprob."""
    die_after_turns: int | None = Field(default=None, ge=1)
    """The engine dies at this generation of its own: all that it was asked fails, and it is unhealthy from then on."""
    deaths: int | None = Field(default=1, ge=1)
    """So many engines of a run die in all, and their successors live; null: each engine dies, also a successor."""
    max_model_len: int = Field(default=4096, ge=2)
    max_token_id: int = Field(default=255, ge=1)
    """Sampled token IDs lie in [0, max_token_id]."""

    @model_validator(mode="after")
    def _consistent(self) -> SimulatedConfig:
        drawn = [key for key in ("turn_latency_s", "latency_sigma") if getattr(self, key)]
        if self.measured is not None and drawn:
            raise ValueError(f"{drawn[0]}: has no meaning beside measured, which says what turns take; remove one")
        if self.batching is not None and (drawn or self.measured is not None):
            key = drawn[0] if drawn else "measured"
            raise ValueError(f"{key}: has no meaning beside batching, which says what turns take; remove one")
        if self.batching is not None:
            self._check_room(self.batching)
        return self

    def _check_room(self, batching: BatchingConfig) -> None:
        room = batching.kv_blocks * batching.block_size
        if room < self.max_model_len:
            raise ValueError(
                f"batching.kv_blocks: {batching.kv_blocks} blocks of {batching.block_size} tokens hold {room}, but one "
                f"request may have max_model_len {self.max_model_len}; expected at least as many"
            )
        if not batching.chunked_prefill and batching.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"batching.max_num_batched_tokens: {batching.max_num_batched_tokens} is less than max_model_len "
                f"{self.max_model_len}; without chunked_prefill a prompt has to fit into one step"
            )


class SimulatedEngine:
    """An `Engine` whose generations are hashes."""

    def __init__(
        self,
        config: SimulatedConfig,
        stop_token_ids: Sequence[int],
        model_dir: str = "",
        model: str = "simulated",
        may_die: Callable[[], bool] = lambda: True,
    ) -> None:
        """Ready at once.

        Args:
            config: see `SimulatedConfig`.
            stop_token_ids: the first ends generations.
            model_dir: the policy's files, of which the HTTP API reads the tokenizer.
            model: what HTTP clients call the model.
            may_die: asked when `die_after_turns` is reached, whether one of the `deaths` is left.
        """
        self._config = config
        self._model_dir = model_dir
        self._model = model
        self._stop_token_id = stop_token_ids[0]
        self._running = asyncio.Event()
        self._running.set()
        self._batched = BatchedGenerations(config.batching) if config.batching else None
        self._life = EngineLife(config.die_after_turns, may_die) if config.die_after_turns else None
        self.weight_version = 0
        self.weights_checksum = ""

    @property
    def batch(self) -> ContinuousBatching | None:
        """With `batching`: what runs and waits, preemptions, use of the KV cache, prefix hits."""
        return self._batched.batch if self._batched else None

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, request_id: str) -> Generation:
        """Deterministic tokens, after the time that the config says; ends with the stop token half of the time.

        Raises:
            SimulatedFault: `error_rate`.
            EngineError: `die_after_turns`.
        """
        if self._life is None:
            return await self._generate(prompt_token_ids, sampling)
        return await self._life.run(self._generate(prompt_token_ids, sampling))

    async def _generate(self, prompt_token_ids: Int32Array, sampling: Sampling) -> Generation:
        config = self._config
        await self._running.wait()
        rng = generator(prompt_token_ids, sampling.seed, self.weight_version)
        latency_s = draw_latency_s(config, rng)
        fails, hangs = rng.random() < config.error_rate, rng.random() < config.hang_rate
        room = max(1, min(sampling.max_tokens, config.max_model_len - len(prompt_token_ids)))
        length = int(rng.integers(1, room + 1))
        token_ids = rng.integers(0, config.max_token_id + 1, length).astype(np.int32)
        stopped = length < room or bool(rng.random() < 0.5)
        if stopped:
            token_ids[-1] = self._stop_token_id
        logprobs = -rng.exponential(1.0, length).astype(np.float32)
        # Drawn last, so that these faults change no tokens.
        slow = config.slow_rate and rng.random() < config.slow_rate
        unusable = config.garbage_rate and rng.random() < config.garbage_rate
        if hangs:
            await asyncio.Event().wait()
        versions: Int32Array | None = None
        if self._batched is not None:
            started, versions = time.monotonic(), np.full(length, self.weight_version, np.int32)
            for made, version in (await self._batched.run(prompt_token_ids, token_ids)).changes:
                versions[made:] = version
            if slow:
                await asyncio.sleep((config.slow_factor - 1) * (time.monotonic() - started))
        elif latency_s:
            await asyncio.sleep(latency_s * config.slow_factor if slow else latency_s)
        if fails:
            raise SimulatedFault("simulated engine: injected error (policy.simulated.error_rate)")
        if versions is None:
            versions = np.full(length, self.weight_version, np.int32)
        generation = Generation(token_ids, logprobs, versions, "stop" if stopped else "length")
        return garbage(generation, rng) if unusable else generation

    async def pause(self) -> None:
        """New generations wait until `resume`; with `batching`, time stands still for those in flight."""
        self._running.clear()
        if self._batched is not None:
            self._batched.pause()

    async def resume(self) -> None:
        """Let waiting generations go on."""
        self._running.set()
        if self._batched is not None:
            self._batched.resume()

    async def load_weights(self, path: str, version: int) -> str:
        """Read the file as an engine would and keep only its checksum. The KV cache goes with the old weights."""
        self.weights_checksum = await asyncio.to_thread(_file_checksum, path)
        self.weight_version = version
        if self._batched is not None:
            self._batched.change_weights(version)
        return self.weights_checksum

    async def check_health(self) -> None:
        """Raises EngineError once it died (`die_after_turns`)."""
        if self._life is not None:
            self._life.check()

    async def asgi_app(self) -> Any:
        """The OpenAI API over these generations."""
        # Starlette and transformers take seconds to import and only a replica needs them.
        from transformers import AutoTokenizer

        from raygym.api.simulated import SimulatedApi

        tokenizer = AutoTokenizer.from_pretrained(self._model_dir)
        return SimulatedApi(self.generate, tokenizer, self._model, self._config.max_model_len).app()

    def shutdown(self) -> None:
        """Nothing to free."""


def generator(prompt_token_ids: Int32Array, seed: int | None, weight_version: int) -> np.random.Generator:
    """What one generation draws from: the same for the same prompt, seed and version."""
    key = hashlib.blake2b(prompt_token_ids.tobytes() + repr((seed, weight_version)).encode())
    return np.random.default_rng(int.from_bytes(key.digest()[:8], "little"))


def draw_latency_s(config: SimulatedConfig, rng: np.random.Generator) -> float:
    """How long one generation takes by itself: what its `generator` draws first. 0 with `batching`."""
    if config.measured is not None:
        return config.measured.at(rng.random())
    mean_s, sigma = config.turn_latency_s, config.latency_sigma
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    return mean_s * float(np.exp(sigma * rng.standard_normal() - sigma**2 / 2)) if sigma else mean_s


def _file_checksum(path: str) -> str:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        base = file.tell()
        checksums = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(base + start)
            checksums[name] = tensor_checksum(file.read(end - start))
    return model_checksum(checksums)
