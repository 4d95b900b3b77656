"""The simulated engine: latency without a model. For tests and for trying a config, never for a result.

Its tokens are a deterministic function of prompt, seed and weight versions, so that runs repeat exactly.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from raygym.engine_clock import EngineClock
from raygym.types import EngineLoad, Float32Array, Generation, Int32Array, Sampling
from raygym.weights import model_checksum, tensor_checksum


class SimulatedConfig(BaseModel):
    """`policy.simulated` of the run config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    turn_latency_s: float = Field(default=0.0, ge=0)
    """Mean time of a generation, whatever its length."""
    latency_sigma: float = Field(default=0.0, ge=0, le=4)
    """0: every generation takes the mean. Above: log-normal with that mean, and this deviation of the logarithm."""
    hang_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of generations that never end, chosen as the failing ones are."""
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of generations that fail, chosen by the same deterministic hash."""
    max_model_len: int = Field(default=4096, ge=2)
    max_token_id: int = Field(default=255, ge=1)
    """Sampled token IDs lie in [0, max_token_id]."""


class SimulatedFault(RuntimeError):
    """An injected fault of the simulated engine."""


class SimulatedEngine:
    """An `Engine` whose generations are hashes."""

    def __init__(
        self, config: SimulatedConfig, stop_token_ids: Sequence[int], model_dir: str = "", model: str = "simulated"
    ) -> None:
        """Ready at once.

        Args:
            config: see `SimulatedConfig`.
            stop_token_ids: the first ends generations.
            model_dir: the policy's files, of which the HTTP API reads the tokenizer.
            model: what HTTP clients call the model.
        """
        self._config = config
        self._model_dir = model_dir
        self._model = model
        self._stop_token_id = stop_token_ids[0]
        self._clock = EngineClock()
        self._generating = 0
        self.weight_version = 0
        self.weights_checksum = ""

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, request_id: str) -> Generation:
        """Tokens at equal intervals over `turn_latency_s`, in which pauses do not count; half of the time a stop token.

        All of it is a function of prompt, seed and the version that it began with; a token that a later version made
        is one of that version, too.
        """
        self._generating += 1
        try:
            return await self._generate(prompt_token_ids, sampling)
        finally:
            self._generating -= 1

    async def _generate(self, prompt_token_ids: Int32Array, sampling: Sampling) -> Generation:
        await self._clock.wait_running()
        started, first_version = self._clock.now(), self.weight_version
        rng = generator(prompt_token_ids, sampling.seed, self.weight_version)
        latency_s = draw_latency_s(self._config, rng)
        fails, hangs = rng.random() < self._config.error_rate, rng.random() < self._config.hang_rate
        room = max(1, min(sampling.max_tokens, self._config.max_model_len - len(prompt_token_ids)))
        length = int(rng.integers(1, room + 1))
        token_ids = self._token_ids(rng, length)
        stopped = length < room or bool(rng.random() < 0.5)
        if hangs:
            await asyncio.Event().wait()
        if latency_s:
            await self._clock.sleep(latency_s)
        if fails:
            raise SimulatedFault("simulated engine: injected error (policy.simulated.error_rate)")
        logprobs = _logprobs(rng, length)
        versions = self._clock.versions(started, latency_s, length)
        if versions[-1] != first_version:
            for version in np.unique(versions[versions != first_version]):
                made, rng = versions == version, generator(prompt_token_ids, sampling.seed, int(version))
                token_ids[made] = self._token_ids(rng, length)[made]
                logprobs[made] = _logprobs(rng, length)[made]
        if stopped:
            token_ids[-1] = self._stop_token_id
        return Generation(token_ids, logprobs, versions, "stop" if stopped else "length")

    def _token_ids(self, rng: np.random.Generator, length: int) -> Int32Array:
        return rng.integers(0, self._config.max_token_id + 1, length).astype(np.int32)

    async def pause(self) -> None:
        """Time stands still for what runs, and new generations wait, until `resume`."""
        self._clock.pause()

    async def resume(self) -> None:
        """Time goes on."""
        self._clock.resume()

    async def load_weights(self, path: str, version: int) -> str:
        """Read the file as an engine would and keep only its checksum."""
        self.weights_checksum = await asyncio.to_thread(_file_checksum, path)
        self.weight_version = version
        self._clock.changed(version)
        return self.weights_checksum

    def load(self) -> EngineLoad:
        """All that it was asked for runs: without a limit of its batch, nothing ever waits."""
        return EngineLoad(self._generating, 0)

    async def check_health(self) -> None:
        """Always healthy."""

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
    """How long one generation takes: what its `generator` draws first."""
    mean_s, sigma = config.turn_latency_s, config.latency_sigma
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    return mean_s * float(np.exp(sigma * rng.standard_normal() - sigma**2 / 2)) if sigma else mean_s


def _logprobs(rng: np.random.Generator, length: int) -> Float32Array:
    return -rng.exponential(1.0, length).astype(np.float32)


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
