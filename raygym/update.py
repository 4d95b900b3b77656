"""One step's updates of the policy on one rank: micro-batches, gradients, optimizer steps, and what they amount to.

An update is exact whatever the number of ranks, the ZeRO stage and the micro-batches: token losses are summed and
divided by what the whole mini-batch amounts to, which every rank knows, since every rank gets the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raygym.algorithms.losses import k1_kl
from raygym.algorithms.objective import loss_divisor, objective
from raygym.learner_config import LearnerConfig
from raygym.learning_rate import learning_rate
from raygym.packing import MicroBatch
from raygym.policy_packing import ROWS, Packing
from raygym.types import Float32Array, TrainSequence

LearnStats = dict[str, float]
"""What `PolicyUpdate.run` returns."""
Reference = Callable[[MicroBatch, float], tuple[Tensor, Tensor]]
"""The starting policy: what `TokenLogprobs` gives for a micro-batch and a temperature."""

_SUMS = ("loss", "kl", "reference_kl", "entropy", "clip_fraction")


class TrainEngine(Protocol):
    """The policy with its optimizer, on one rank of a gang."""

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logprobs (with gradient) and entropies of the trained tokens; see `TokenLogprobs`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; the mean over ranks counts. `last`: of this mini-batch."""

    def step(self, lr: float) -> float:
        """One optimizer update, after which gradients are 0. Returns the gradient's norm before clipping."""


class PolicyUpdate:
    """The updates of one run on one rank. All ranks call the same methods at the same time."""

    def __init__(
        self,
        config: LearnerConfig,
        engine: TrainEngine,
        temperature: float,
        *,
        packing: Packing = ROWS,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        reference: Reference | None = None,
        total_updates: int | None = None,
    ) -> None:
        """No update was made yet.

        Args:
            config: `learner` of the run.
            engine: the policy that learns.
            temperature: of the sampling; logprobs are of the distribution that was sampled from.
            packing: of the micro-batches; policy and reference must be able to compute it.
            rank: of this process in the default process group.
            world_size: how many ranks there are; with 1 there need not be a process group.
            device: where the policy is; the CPU by default.
            reference: the starting policy, where `kl_coef` is above 0.
            total_updates: of the whole run; needed where `lr_schedule` falls.
        """
        self._config = config
        self._engine = engine
        self._temperature = temperature
        self._packing = packing
        self._rank = rank
        self._world_size = world_size
        self._device = device or torch.device("cpu")
        self._reference = reference
        self._total_updates = total_updates
        self.updates = 0
        """Optimizer updates that were made."""

    def run(self, sequences: Sequence[TrainSequence]) -> LearnStats:
        """Make `mini_batches` optimizer updates from one step's sequences, in group order.

        Each mini-batch is a contiguous, nearly equal part. One without signal (all advantages 0, or no trained token)
        still is an AdamW step: gradients are 0 but momentum and weight decay act, as for any other small gradient.

        Returns:
            Of all ranks together: `loss`, `entropy`, `kl` (mean of behaviour - current logprob: k1 of the engine's
            policy to this one), `reference_kl` (by `kl_estimator`; 0 without kl_coef) and `clip_fraction`, means over
            trained tokens (`loss`: by `loss_mean`, over all sequences; without a KL term, sequences of advantage 0 are
            not computed at all);
            `grad_norm` (before clipping, mean of the updates) and `lr` (of the last); `logprob_abs_diff` and
            `logprob_abs_diff_max`, |learner - engine| over the trained tokens of the first mini-batch, so with the
            very weights that sampled if the batch is on-policy; `tokens_trained`, `tokens_total`,
            `shared_fraction` (of those, what was not computed since another sequence has it), `padding_fraction` (of
            all computed positions), `seconds`.
        """
        started = time.monotonic()
        # loss ... clip_fraction, |diff|, tokens, computed tokens, cells; reduced over ranks once, at the end.
        totals = torch.zeros(len(_SUMS) + 4, dtype=torch.float64, device=self._device)
        worst = torch.zeros((), dtype=torch.float64, device=self._device)
        divisors, trained, first_trained, norms = 0.0, 0, 0, []
        for number, part in enumerate(np.array_split(np.arange(len(sequences)), self._config.mini_batches)):
            mini_batch = [sequences[index] for index in part]
            divisor = loss_divisor(self._config, mini_batch)
            computed = self._with_signal(mini_batch)
            sums, differences = self._accumulate_gradients(computed, divisor)
            totals += sums
            divisors += divisor
            trained += (with_gradient := sum(int(sequence.loss_mask.sum()) for sequence in computed))
            if number == 0:
                totals[len(_SUMS)] = differences.sum()
                worst, first_trained = differences.amax(), with_gradient
            norms.append(self._engine.step(self._lr(self.updates)))
            self.updates += 1
        if self._world_size > 1:
            dist.all_reduce(totals)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        *sums_, difference, tokens, computed, cells = totals.tolist()
        return {
            **{name: value / max(1, trained) for name, value in zip(_SUMS, sums_, strict=True)},
            "loss": sums_[0] / max(1.0, divisors),
            "grad_norm": sum(norms) / len(norms),
            "lr": self._lr(self.updates - 1),
            "logprob_abs_diff": difference / max(1, first_trained),
            "logprob_abs_diff_max": worst.item(),
            "tokens_trained": float(trained),
            "tokens_total": tokens,
            "shared_fraction": 1 - computed / tokens if tokens else 0.0,
            "padding_fraction": 1 - computed / cells if cells else 0.0,
            "seconds": time.monotonic() - started,
        }

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[TrainSequence]) -> dict[int, Float32Array]:
        """Logprobs of the trained tokens under the current weights.

        Returns:
            For each sequence of this rank's share: its index -> T logprobs, 0 where the mask is False.
        """
        found: dict[int, Float32Array] = {}
        for indices in self._micro_batches(sequences):
            share = [sequences[index] for index in indices]
            logprobs_N = self._engine.logprobs(self._packing.pack(share).to(self._device))[0].cpu().numpy()
            start = 0
            for index, sequence in zip(indices, share, strict=True):
                found[index] = np.zeros(len(sequence.token_ids), dtype=np.float32)
                count = int(sequence.loss_mask.sum())
                found[index][sequence.loss_mask] = logprobs_N[start : start + count]
                start += count
        return found

    def _with_signal(self, mini_batch: list[TrainSequence]) -> list[TrainSequence]:
        # Without a KL term, an advantage of 0 gives a gradient of exactly 0: nothing need be computed for it. One is
        # kept where none has signal, so that every rank still steps and the engine is still compared.
        if self._config.kl_coef:
            return mini_batch
        return [sequence for sequence in mini_batch if sequence.advantage != 0.0] or mini_batch[:1]

    def _micro_batches(self, sequences: Sequence[TrainSequence]) -> list[tuple[int, ...]]:
        budget = self._config.tokens_per_micro_batch
        return self._packing.assign(sequences, self._world_size, budget)[self._rank]

    def _accumulate_gradients(self, mini_batch: list[TrainSequence], divisor: float) -> tuple[Tensor, Tensor]:
        """This rank's backward passes. Returns its totals (see `run`) and |learner - engine| of its tokens."""
        micro_batches = self._micro_batches(mini_batch)
        totals = torch.zeros(len(_SUMS) + 4, dtype=torch.float64, device=self._device)
        differences = [torch.zeros(1, dtype=torch.float64, device=self._device)]
        for number, indices in enumerate(micro_batches):
            batch = self._packing.pack([mini_batch[index] for index in indices]).to(self._device)
            logprobs_N, entropies_N = self._engine.logprobs(batch)
            loss, sums, difference_N = self._loss(batch, logprobs_N, entropies_N)
            # The mean over ranks counts; ours are parts of one sum.
            scaled = loss * (self._world_size / max(1.0, divisor))
            self._engine.backward(scaled, last=number == len(micro_batches) - 1)
            totals[: len(_SUMS)] += sums
            totals[-3] += batch.num_tokens
            totals[-2] += batch.num_computed
            totals[-1] += batch.num_cells if indices else 0
            differences.append(difference_N.double())
        return totals, torch.cat(differences)

    def _loss(self, batch: MicroBatch, logprobs_N: Tensor, entropies_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, the sums named by `_SUMS`, and |learner - engine| of each token."""
        reference_N = None
        if self._reference is not None:
            with torch.no_grad():
                reference_N, _ = self._reference(batch, self._temperature)
        loss, reference_kl, clipped = objective(self._config, batch, logprobs_N, reference_N)
        behaviour_kl_N = k1_kl(batch.behaviour_N, logprobs_N.detach()) * batch.mask_N
        entropy = (entropies_N * batch.mask_N).sum()
        sums = [loss.detach(), behaviour_kl_N.sum(), reference_kl, entropy, clipped]
        return loss, torch.stack([value.double() for value in sums]), behaviour_kl_N.abs()

    def _lr(self, update: int) -> float:
        return learning_rate(self._config, update, self._total_updates)
