"""A `TrainEngine` of a small Transformers model with plain AdamW, and several of them as the ranks of a gang."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from raygym.packing import MicroBatch
from raygym.policy_model import TokenLogprobs

VOCAB = 64
T = TypeVar("T")


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of 16, float64, so that sums in another order differ by next to nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).double().eval()


class Gang:
    """Ranks in threads of this process, in place of a process group."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._values: list[Tensor] = []
        self._lock = threading.Lock()
        self._met = threading.Barrier(ranks, timeout=60)

    def all_reduce(self, value: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        """As torch.distributed's: `value` becomes that of all ranks together."""
        with self._lock:
            self._values.append(value.clone())
        self._met.wait()
        everyone = torch.stack(self._values)
        reduced = everyone.amax(0) if op == torch.distributed.ReduceOp.MAX else everyone.sum(0)
        if self._met.wait() == 0:
            self._values.clear()
        self._met.wait()
        value.copy_(reduced)

    def run(self, rank_main: Callable[[int], T]) -> list[T]:
        """What each rank returns, all at once."""
        results: dict[int, T] = {}
        failures: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                results[rank] = rank_main(rank)
            except BaseException as error:
                failures.append(error)
                self._met.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [results[rank] for rank in range(self.ranks)]


class PlainEngine:
    """One rank. Keeps the whole gradient of each update, before clipping."""

    def __init__(self, policy: LlamaForCausalLM, temperature: float, gang: Gang | None = None) -> None:
        self.policy = copy.deepcopy(policy)
        self.gradients: list[Tensor] = []
        self.forwards = 0
        self._model = TokenLogprobs(self.policy)
        self._temperature = temperature
        self._gang = gang
        # A large eps: Adam divides by a gradient's own size, which makes much of rounding where that is next to 0.
        self._optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, eps=1e-3)

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        logprobs_N, entropies_N = self._model(batch, self._temperature)
        return logprobs_N, entropies_N

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for parameter in self.policy.parameters():
            assert parameter.grad is not None
            if self._gang is not None:
                self._gang.all_reduce(parameter.grad)
                parameter.grad /= self._gang.ranks
        gradients = [p.grad.flatten() for p in self.policy.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self.gradients[-1].norm().item()
