"""A `TrainEngine` of a few numbers: the next token's logits depend on the last token only, so any packing is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from raygym.packing import MicroBatch


class TableEngine:
    """A table of logits (V x V), learned by plain gradient descent."""

    def __init__(self, vocab_size: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table_VV = torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64).requires_grad_()
        self.steps = 0

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        last_N = batch.input_ids_BL.flatten()[batch.positions_N]
        logprobs_NV = self.table_VV[last_N].log_softmax(-1)
        entropies_N = -(logprobs_NV.detach().exp() * logprobs_NV.detach()).sum(-1)
        return logprobs_NV.gather(-1, batch.target_ids_N[:, None])[:, 0], entropies_N

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        gradient = self.table_VV.grad
        assert gradient is not None
        norm = gradient.norm().item()
        if gradient.isfinite().all():
            self.steps += 1
            self.table_VV.data -= lr * gradient
        self.table_VV.grad = None
        return norm
