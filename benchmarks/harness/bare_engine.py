"""vLLM by itself: no Serve, no server, no actor. What raygym's engines cannot be faster than."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from raygym.actors import serving
from raygym.config import PolicyConfig
from raygym.models import resolve_policy

PROMPT, ANSWER = 64, 32
_OPTIONS = {"max_model_len": 512, "enable_prefix_caching": False}


class BareEngine:
    """vLLM's own `LLM`, with the engine options and the environment that a replica has."""

    def __init__(self, model: str, options: Mapping[str, Any] | None = None) -> None:
        """Start it; it ends with the process. `options`: vLLM's, instead of those that a replica has."""
        model_dir = str(resolve_policy(model))
        config = serving.with_engine_defaults(
            PolicyConfig(model=model, vllm={**_OPTIONS, **(options or {})}), model_dir
        )
        os.environ.update(serving.engine_environment(config))
        # After the environment is set, which vLLM reads when it is imported.
        from vllm import LLM

        self._llm: Any = LLM(
            model_dir, **config.vllm, generation_config="vllm", logprobs_mode="processed_logprobs", seed=0
        )
        self.tokens_per_s(1)

    def tokens_per_s(self, at_once: int) -> float:
        """So many prompts of 64 random tokens, each answered by 32 tokens; generated tokens a second of them all."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in _drawn(at_once)]
        sampling = SamplingParams(temperature=1.0, max_tokens=ANSWER, ignore_eos=True, logprobs=0, seed=0)
        started = time.perf_counter()
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return float(sum(len(answer.outputs[0].token_ids) for answer in answers) / seconds)

    def logprobs(self) -> list[float]:
        """Of the tokens of eight prompts, but for each one's first."""
        from vllm import SamplingParams, TokensPrompt

        prompts, sampling = _drawn(8), SamplingParams(max_tokens=1, prompt_logprobs=0)
        answers = self._llm.generate(
            [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts], sampling, use_tqdm=False
        )
        return [
            float(at[token].logprob)
            for tokens, answer in zip(prompts, answers, strict=True)
            for token, at in zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)
        ]


def _drawn(prompts: int) -> list[list[int]]:
    drawn: list[list[int]] = np.random.default_rng(prompts).integers(100, 40_000, (prompts, PROMPT)).tolist()
    return drawn
