"""The simulated engine: latency without a model. For tests and for trying a config, never for a result.

Its tokens are a deterministic function of prompt, seed and weight versions, so that runs repeat exactly. Its time is
drawn for each generation, or comes from a model of continuous batching (`simulated_batching.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from raygym.batched_generations import BatchedGenerations
from raygym.batching_config import BatchingConfig
from raygym.engine_clock import EngineClock
from raygym.latency_profile import MeasuredLatency
from raygym.simulated_batching import ContinuousBatching
from raygym.simulated_faults import EngineLife, SimulatedFault, garbage
from raygym.tokenizer_loading import load_tokenizer
from raygym.types import EngineLoad, Float32Array, Generation, Int32Array, Sampling
from raygym.version_file import file_checksums
from raygym.weight_checksums import model_checksum


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
        self._clock = EngineClock()
        self._generating = 0
        self._batched = BatchedGenerations(config.batching) if config.batching else None
        self._life = EngineLife(config.die_after_turns, may_die) if config.die_after_turns else None
        self.weight_version = 0
        self.weights_checksum = ""
        self.first_token_at: float | None = None
        """When it gave its first answer: what it simulates are whole generations."""

    @property
    def batch(self) -> ContinuousBatching | None:
        """With `batching`: what runs and waits, preemptions, use of the KV cache, prefix hits."""
        return self._batched.batch if self._batched else None

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, request_id: str) -> Generation:
        """Tokens after the time that the config says, in which pauses do not count; half of the time a stop token.

        All of it is a function of prompt, seed and the version that it began with; a token that a later version made
        is one of that version, too.

        Raises:
            SimulatedFault: `error_rate`.
            EngineError: `die_after_turns`.
        """
        self._generating += 1
        try:
            generating = self._generate(prompt_token_ids, sampling)
            answer = await (generating if self._life is None else self._life.run(generating))
            if self.first_token_at is None:
                self.first_token_at = time.time()
            return answer
        finally:
            self._generating -= 1

    async def _generate(self, prompt_token_ids: Int32Array, sampling: Sampling) -> Generation:
        config = self._config
        await self._clock.wait_running()
        started, first_version = self._clock.now(), self.weight_version
        rng = generator(prompt_token_ids, sampling.seed, self.weight_version)
        latency_s = draw_latency_s(config, rng)
        fails, hangs = rng.random() < config.error_rate, rng.random() < config.hang_rate
        room = max(1, min(sampling.max_tokens, config.max_model_len - len(prompt_token_ids)))
        length = int(rng.integers(1, room + 1))
        token_ids = self._token_ids(rng, length)
        stopped = length < room or bool(rng.random() < 0.5)
        if stopped:
            token_ids[-1] = self._stop_token_id
        logprobs = _logprobs(rng, length)

        def drawn(version: int) -> tuple[Int32Array, Float32Array]:
            """As another version makes them; those that it does make are taken."""
            own_rng = generator(prompt_token_ids, sampling.seed, version)
            tokens = self._token_ids(own_rng, length)
            if stopped:
                tokens[-1] = self._stop_token_id
            return tokens, _logprobs(own_rng, length)

        def redrawn(version: int) -> Int32Array:
            return drawn(version)[0]

        # Drawn last, so that these faults change no tokens.
        slow = config.slow_rate and rng.random() < config.slow_rate
        unusable = config.garbage_rate and rng.random() < config.garbage_rate
        if hangs:
            await asyncio.Event().wait()
        if self._batched is not None:
            versions = np.full(length, first_version, np.int32)
            request = await self._batched.run(prompt_token_ids, token_ids, redrawn)
            for count, version in request.changes:
                versions[count:] = version
            if slow:
                await self._clock.sleep((config.slow_factor - 1) * (self._clock.time() - started.seconds))
        else:
            latency_s *= config.slow_factor if slow else 1.0
            if latency_s:
                await self._clock.sleep(latency_s)
            versions = self._clock.versions(started, latency_s, length)
        if fails:
            raise SimulatedFault("simulated engine: injected error (policy.simulated.error_rate)")
        if versions[-1] != first_version:
            for version in np.unique(versions[versions != first_version]):
                made, (tokens, probabilities) = versions == version, drawn(int(version))
                token_ids[made], logprobs[made] = tokens[made], probabilities[made]
        generation = Generation(token_ids, logprobs, versions, "stop" if stopped else "length")
        return garbage(generation, rng) if unusable else generation

    def _token_ids(self, rng: np.random.Generator, length: int) -> Int32Array:
        return rng.integers(0, self._config.max_token_id + 1, length).astype(np.int32)

    async def pause(self) -> None:
        """Time stands still for what runs, and new generations wait, until `resume`."""
        self._clock.pause()
        if self._batched is not None:
            self._batched.pause()

    async def resume(self) -> None:
        """Time goes on."""
        self._clock.resume()
        if self._batched is not None:
            self._batched.resume()

    async def load_weights(self, path: str, version: int) -> str:
        """Read the file as an engine would and keep only its checksum. The KV cache goes with the old weights."""
        self.weights_checksum = model_checksum(await asyncio.to_thread(file_checksums, path))
        self.weight_version = version
        self._clock.changed(version)
        if self._batched is not None:
            self._batched.change_weights(version)
        return self.weights_checksum

    def load(self) -> EngineLoad:
        """Without `batching` all that it was asked for runs, and nothing ever waits."""
        if (batch := self.batch) is None:
            return EngineLoad(self._generating, 0)
        return EngineLoad(batch.running, batch.waiting - batch.frozen, batch.preemptions, batch.kv_usage)

    async def check_health(self) -> None:
        """Raises EngineError once it died (`die_after_turns`)."""
        if self._life is not None:
            self._life.check()

    async def asgi_app(self) -> Any:
        """The OpenAI API over these generations."""
        # Starlette and transformers take seconds to import and only a replica needs them.
        from raygym.api.simulated import SimulatedApi

        tokenizer = load_tokenizer(self._model_dir)
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


def _logprobs(rng: np.random.Generator, length: int) -> Float32Array:
    return -rng.exponential(1.0, length).astype(np.float32)
