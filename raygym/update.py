"""One step's updates of the policy on one rank: micro-batches, gradients, optimizer steps, and what they amount to.

An update is exact whatever the number of ranks, the ZeRO stage and the micro-batches: token losses are summed and
divided by what the whole mini-batch amounts to, which every rank knows, since every rank gets the whole batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raygym.algorithms.objective import Objective, loss_divisor, objective
from raygym.learner_config import LearnerConfig
from raygym.learning_rate import learning_rate
from raygym.model_flops import ModelFlops
from raygym.packing import MicroBatch
from raygym.policy_packing import ROWS, Packing
from raygym.types import Float32Array, LearnStats, TrainSequence
from raygym.update_statistics import UpdateStatistics

ComputeLogprobs = Callable[[MicroBatch], tuple[Tensor, Tensor]]
Reference = Callable[[MicroBatch, float], tuple[Tensor, Tensor]]
"""The starting policy: what `TokenLogprobs` gives for a micro-batch and a temperature."""

__all__ = ["PolicyUpdate", "TrainEngine"]


class TrainEngine(Protocol):
    """The policy with its optimizer, on one rank of a gang."""

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logprobs (with gradient) and entropies of the trained tokens; see `TokenLogprobs`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; the mean over ranks counts. `last`: of this mini-batch."""

    def step(self, lr: float) -> float:
        """One optimizer update, after which gradients are 0. Returns the gradient's norm before clipping.

        Where that is not finite, no weight was changed.
        """


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
        flops: ModelFlops | None = None,
        peak_flops: float | None = None,
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
            flops: what the policy's arithmetic costs, for `tflops_per_s`.
            peak_flops: operations a second that the device of one rank can do, for `mfu`.
        """
        self._config = config.resolved()
        self._engine = engine
        self._temperature = temperature
        self._packing = packing
        self._rank = rank
        self._world_size = world_size
        self._device = device or torch.device("cpu")
        self._reference = reference
        self._flops = flops
        self._peak_flops = peak_flops
        self._total_updates = total_updates
        self.updates = 0
        """Optimizer updates that were made."""
        # Of the last run: which sequences a micro-batch had, by their index in the step, and their logprobs.
        self._learned: list[tuple[list[tuple[int, TrainSequence]], Tensor]] = []

    def run(self, sequences: Sequence[TrainSequence]) -> LearnStats:
        """Make `mini_batches` optimizer updates from one step's sequences, in group order.

        Each mini-batch is a contiguous, nearly equal part. One without signal (all advantages 0, or no trained token)
        still is an AdamW step: gradients are 0 but momentum and weight decay act, as for any other small gradient.

        Nothing that is not finite gets into the weights: where a loss or a gradient's norm is none, that update and
        those after it are not made, on any rank, and `loss` or `grad_norm` says so. Such a policy learns no further.

        Returns:
            Of all ranks together, over trained tokens unless told otherwise. Without a KL or entropy term, sequences
            of advantage 0 are not computed at all, and count nowhere but in the divisor of `loss`.
            `loss`: the mean by `loss_mean`; `entropy`;
            `kl`, `kl_k3`: KL of the policy that sampled to this one, by k1 and k3; `reference_kl`: by `kl_estimator`, 0
            where the loss has no KL term;
            `clip_fraction`, and apart `clip_fraction_low` and `clip_fraction_high`: tokens whose ratio is bounded, from
            below or above;
            `correction_fraction` (truncated, masked or rejected) and `correction_weight` (1 where losses are not
            weighed);
            `ratio_mean`, `ratio_min`, `ratio_max`, `log_ratio_std`: of this policy to the one that sampled;
            `ratio_ess`: effective sample size as a share, (sum of ratios)^2 / (N x sum of their squares), 1 on-policy;
            `logprob_abs_diff`, `logprob_abs_diff_max`: |learner - engine| over the first mini-batch, so with the very
            weights that sampled if the batch is on-policy;
            `updates` that were made, `grad_norm` (before clipping, their mean) and `lr` (of the last);
            `tokens_trained`, `tokens_total`, `shared_fraction` (of those, what was not computed since another sequence
            has it), `padding_fraction` (of all computed positions);
            `seconds` of the slowest rank, `tokens_per_s` (of `tokens_total`), and where they are known `tflops_per_s`
            and `mfu` (see `ModelFlops`; of what was computed).
        """
        started = time.monotonic()
        statistics = UpdateStatistics(self._device)
        self._learned = []
        places = {id(sequence): index for index, sequence in enumerate(sequences)}
        divisors, lr, norms, before = 0.0, 0.0, [], self.updates
        parts = np.array_split(np.arange(len(sequences)), self._config.mini_batches)
        mini_batches = [[sequences[index] for index in part] for part in parts]
        with_signal = [self._with_signal(mini_batch) for mini_batch in mini_batches]
        proximal = self._proximal_logprobs(with_signal)
        for number, (mini_batch, learned_from) in enumerate(zip(mini_batches, with_signal, strict=True)):
            divisor = loss_divisor(self._config, mini_batch)
            divisors += divisor
            self._accumulate_gradients(learned_from, places, divisor, proximal[number], statistics, first=number == 0)
            if not self._finite_everywhere(statistics.loss):
                break
            lr = self._lr(self.updates)
            norms.append(self._engine.step(lr))
            if not math.isfinite(norms[-1]):
                break
            self.updates += 1
        seconds = time.monotonic() - started
        stats = statistics.reduced(self._world_size, seconds, self._flops, self._peak_flops)
        stats["loss"] /= max(1.0, divisors)
        grad_norm = fmean(norms) if norms else math.nan
        return stats | {"updates": float(self.updates - before), "grad_norm": grad_norm, "lr": lr}

    def token_logprobs(self, sequences: Sequence[TrainSequence]) -> dict[int, Float32Array]:
        """Logprobs of the trained tokens under the current weights.

        Returns:
            For each sequence of this rank's share: its index -> T logprobs, 0 where the mask is False.
        """
        return self._logprobs_of(sequences, self._engine.logprobs)

    def learned_logprobs(self) -> dict[int, Float32Array]:
        """Logprobs that trained tokens had when the last `run` learned from them: of its first mini-batch under the
        weights that it began with, of later ones after the updates before.

        Returns:
            For each sequence of this rank's share that was computed: its index -> T logprobs, 0 where the mask is
            False. They are told once.
        """
        found: dict[int, Float32Array] = {}
        for share, logprobs_N in self._learned:
            found |= _by_sequence(share, logprobs_N)
        self._learned = []
        return found

    def reference_logprobs(self, sequences: Sequence[TrainSequence]) -> dict[int, Float32Array]:
        """The same under the starting policy, which is there where `kl_coef` is above 0."""
        reference = self._reference
        assert reference is not None, "kl_coef: 0 keeps no starting policy"
        return self._logprobs_of(sequences, lambda batch: reference(batch, self._temperature))

    @torch.no_grad()
    def _logprobs_of(self, sequences: Sequence[TrainSequence], compute: ComputeLogprobs) -> dict[int, Float32Array]:
        found: dict[int, Float32Array] = {}
        for indices, most_trained in self._micro_batches(sequences):
            logprobs_N = compute(self._packed(sequences, indices, most_trained))[0]
            found |= _by_sequence([(index, sequences[index]) for index in indices], logprobs_N)
        return found

    def _with_signal(self, mini_batch: list[TrainSequence]) -> list[TrainSequence]:
        # Without other terms, advantages of 0 give a gradient of exactly 0: nothing need be computed for them. One is
        # kept where none has signal, so that every rank still steps and the engine is still compared.
        if self._config.kl_in_loss or self._config.entropy_coef:
            return mini_batch
        return [sequence for sequence in mini_batch if sequence.has_signal] or mini_batch[:1]

    @torch.no_grad()
    def _proximal_logprobs(self, mini_batches: list[list[TrainSequence]]) -> list[list[Tensor] | None]:
        """For each mini-batch the current logprobs of its micro-batches, where the update will need them: not of the
        first, whose own forward passes come before any update."""
        found: list[list[Tensor] | None] = [None] * len(mini_batches)
        if self._config.weighs_tokens:
            for number, mini_batch in list(enumerate(mini_batches))[1:]:
                found[number] = [
                    self._engine.logprobs(self._packed(mini_batch, *micro_batch))[0].detach()
                    for micro_batch in self._micro_batches(mini_batch)
                ]
        return found

    def _packed(self, sequences: Sequence[TrainSequence], indices: Sequence[int], most_trained: int) -> MicroBatch:
        batch = self._packing.pack([sequences[index] for index in indices])
        return replace(batch, most_trained=most_trained).to(self._device)

    def _micro_batches(self, sequences: Sequence[TrainSequence]) -> list[tuple[tuple[int, ...], int]]:
        """This rank's, as indices, each with the most trained tokens that a rank has at the same time."""
        ranks = self._packing.assign(sequences, self._world_size, self._config.tokens_per_micro_batch)
        trained = [int(sequence.loss_mask.sum()) for sequence in sequences]
        most = [max(sum(trained[index] for index in each) for each in at_once) for at_once in zip(*ranks, strict=True)]
        return list(zip(ranks[self._rank], most, strict=True))

    def _accumulate_gradients(
        self,
        mini_batch: list[TrainSequence],
        places: Mapping[int, int],
        divisor: float,
        proximal: list[Tensor] | None,
        statistics: UpdateStatistics,
        *,
        first: bool,
    ) -> None:
        """This rank's backward passes, counted in `statistics`."""
        micro_batches = self._micro_batches(mini_batch)
        for number, (indices, most_trained) in enumerate(micro_batches):
            batch = self._packed(mini_batch, indices, most_trained)
            logprobs_N, entropies_N = self._engine.logprobs(batch)
            proximal_N = logprobs_N.detach() if proximal is None else proximal[number]
            parts = self._objective(batch, logprobs_N, entropies_N, proximal_N)
            # The mean over ranks counts; ours are parts of one sum.
            scaled = parts.loss * (self._world_size / max(1.0, divisor))
            self._engine.backward(scaled, last=number == len(micro_batches) - 1)
            statistics.add(batch, logprobs_N, entropies_N, parts, first=first)
            learned = [mini_batch[index] for index in indices]
            self._learned.append(([(places[id(sequence)], sequence) for sequence in learned], logprobs_N.detach()))

    def _objective(self, batch: MicroBatch, logprobs_N: Tensor, entropies_N: Tensor, proximal_N: Tensor) -> Objective:
        reference_N = None
        if self._reference is not None and self._config.kl_in_loss:
            with torch.no_grad():
                reference_N, _ = self._reference(batch, self._temperature)
        return objective(self._config, batch, logprobs_N, reference_N, proximal_N=proximal_N, entropies_N=entropies_N)

    def _finite_everywhere(self, loss: Tensor) -> bool:
        """Whether the loss of every rank is finite: all of them step, or none does."""
        refused = (~loss.isfinite()).float()
        if self._world_size > 1:
            dist.all_reduce(refused, op=dist.ReduceOp.MAX)
        return not refused.item()

    def _lr(self, update: int) -> float:
        return learning_rate(self._config, update, self._total_updates)


def _by_sequence(share: Sequence[tuple[int, TrainSequence]], logprobs_N: Tensor) -> dict[int, Float32Array]:
    """A micro-batch's logprobs as those of its sequences, by index: T each, 0 where the mask is False."""
    values_N = logprobs_N.float().cpu().numpy()
    found: dict[int, Float32Array] = {}
    start = 0
    for index, sequence in share:
        found[index] = np.zeros(len(sequence.token_ids), dtype=np.float32)
        count = int(sequence.loss_mask.sum())
        found[index][sequence.loss_mask] = values_N[start : start + count]
        start += count
    return found
