"""What a generation engine is to the rest of raygym: the protocol that real and simulated engines keep."""

from __future__ import annotations

from typing import Any, Protocol

from raygym.types import EngineLoad, Generation, Int32Array, Sampling

NO_LOGPROB = -9000.0
"""vLLM writes -9999 where it has no logprob; real ones of a float32 softmax never get near."""


class EngineError(RuntimeError):
    """The engine could not do what it was asked; the text says what and why."""


class Engine(Protocol):
    """One generation engine, driven from the event loop of its replica."""

    weight_version: int
    weights_checksum: str
    """`weight_checksums.model_checksum` of the weights in use; empty until the first version was applied."""

    @property
    def first_token_at(self) -> float | None:
        """When it made its first token, in seconds since the epoch by its machine's clock; None before that."""

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, request_id: str) -> Generation:
        """Sample one continuation. Cancelling the call frees the request in the engine."""

    async def pause(self) -> None:
        """Stop scheduling; requests in flight are kept and go on at `resume`."""

    async def resume(self) -> None:
        """Undo `pause`."""

    async def load_weights(self, path: str, version: int) -> str:
        """Replace all weights by those of a safetensors file, while paused. Returns their model checksum."""

    def load(self) -> EngineLoad:
        """What it has to do now, as last known; costs nothing."""

    async def check_health(self) -> None:
        """Raises when the engine can no longer serve."""

    async def asgi_app(self) -> Any:
        """The engine's OpenAI-compatible HTTP application."""

    def shutdown(self) -> None:
        """Free everything, worker processes included."""
