"""Rollouts of given lengths for `benchmarks/learner.py`: a real text, and logprobs of nearly the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.learn_rollouts import Rollouts

TEXT = Path(__file__).resolve().parent.parent.parent / "LICENSE"
MARGIN = 1e-3
"""No ratio is nearer than this to a bound, where the last bit of a logit would decide on which side it is."""


@dataclass(frozen=True)
class Workload:
    """Lengths of a step's sequences. Within a group prompts are the same."""

    groups: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    """Of each, or with a `sigma` the median."""
    sigma: float = 0.0
    """Of the logarithm of the lengths, which are then log-normal."""
    longest: int = 0
    """Tokens, at which a log-normal completion is cut, as `max_tokens` would."""

    def completion_lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Tokens of each of the groups x group_size completions, all >= 1."""
        count = self.groups * self.group_size
        if not self.sigma:
            return np.full(count, self.completion_tokens)
        drawn = self.completion_tokens * np.exp(rng.normal(0, self.sigma, count))
        return np.clip(drawn.round(), 1, self.longest).astype(np.int64)


def make_rollouts(
    workload: Workload,
    model_dir: Path,
    *,
    temperature: float = 1.0,
    noise: float = 0.15,
    bounds: Sequence[float] = (0.8, 1.2),
    largest_reward: float = 1000.0,
    seed: int = 0,
) -> Rollouts:
    """The same rollouts for the same arguments.

    Token IDs are pieces of a text. The sampler's logprobs are the model's own plus normal noise of deviation `noise`,
    so that ratios are near 1 and some are beyond `bounds`. Rewards differ within every group, so no sequence can be
    left out; they are large, so that what is added to a deviation (1e-6 here, 1e-4 in TRL) makes no difference.
    """
    rng = np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # Not verbose: it would warn that the whole text is longer than the model's context, which no piece of it is.
    text_T = np.array(tokenizer(TEXT.read_text(), verbose=False)["input_ids"], dtype=np.int32)

    def piece(length: int) -> NDArray[np.int32]:
        start = rng.integers(len(text_T) - length)
        return text_T[start : start + length].copy()

    prompts = [p for _ in range(workload.groups) for p in [piece(workload.prompt_tokens)] * workload.group_size]
    completions = [piece(int(length)) for length in workload.completion_lengths(rng)]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    logprobs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        own_N = completion_logprobs(model, prompt, completion, temperature)
        logprobs.append((own_N - _log_ratios(len(own_N), noise, bounds, rng)).astype(np.float32))
    rewards = rng.uniform(0, largest_reward, len(prompts)).tolist()
    return Rollouts(prompts, completions, logprobs, rewards, workload.group_size)


@torch.no_grad()
def completion_logprobs(
    model: Any, prompt: NDArray[np.int32], completion: NDArray[np.int32], temperature: float
) -> NDArray[np.float32]:
    """Of the completion's N tokens, plainly."""
    ids_T = torch.from_numpy(np.concatenate([prompt, completion])).long()
    logits_NV = model(ids_T[None], logits_to_keep=len(completion) + 1).logits[0, :-1] / temperature
    logprobs_N: NDArray[np.float32] = logits_NV.log_softmax(-1).gather(-1, ids_T[len(prompt) :, None])[:, 0].numpy()
    return logprobs_N


def _log_ratios(count: int, noise: float, bounds: Sequence[float], rng: np.random.Generator) -> NDArray[np.float64]:
    log_ratios_N = rng.normal(0, noise, count)
    while (near_N := np.min([np.abs(np.exp(log_ratios_N) - bound) for bound in bounds], axis=0) < MARGIN).any():
        log_ratios_N[near_N] = rng.normal(0, noise, near_N.sum())
    return log_ratios_N
