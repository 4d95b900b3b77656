"""What a simulated engine's steps cost, and the limits of its batch. Names are vLLM's where it has one."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raygym.latency_profile import read_profile


class BatchingConfig(BaseModel):
    """`policy.simulated.batching`: what a step costs, and the batch's limits; inline, or the path of a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step_s: float = Field(gt=0, allow_inf_nan=False)
    """Seconds of a step, whatever is in it."""
    request_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds more for each request in it."""
    kv_token_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds more for each token that these requests have in the KV cache."""
    prefill_token_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds more for each prompt token that is computed."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Requests that run at once; others wait, first come, first served."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens of one step: one of each request that generates, and prompt tokens in the rest."""
    chunked_prefill: bool = True
    """A prompt is spread over steps where it does not fit into one. Off, as on CPU: it waits until it does."""
    kv_blocks: int = Field(default=16384, ge=1)
    block_size: int = Field(default=16, ge=1)
    """Tokens of one of the `kv_blocks`."""
    prefix_caching: bool = True
    """Keep the blocks of ended requests until the room is needed; what a prompt shares with them is not computed."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        return read_profile(data)

    @model_validator(mode="after")
    def _consistent(self) -> BatchingConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is less than max_num_seqs "
                f"{self.max_num_seqs}; expected room for one token of each running request"
            )
        return self
