"""What an update amounts to: sums and extremes over its micro-batches, and over ranks, with two reductions in all.

Everything is a sum or a maximum over trained tokens, so how a mini-batch is cut into micro-batches and ranks changes no
result. With p the policy that sampled and q the one that learns, a token's ratio is q/p, in the order of `losses.py`.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from raygym.algorithms.losses import k3_kl
from raygym.algorithms.objective import Objective
from raygym.model_flops import ModelFlops
from raygym.packing import MicroBatch
from raygym.types import LearnStats

# Float64 each. "sampled": of the first mini-batch, whose weights may be the ones that sampled.
_SUMS = (
    "loss", "kl", "kl_k3", "reference_kl", "entropy", "clipped", "clipped_high", "corrected", "correction", "ratio",
    "squared_ratio", "squared_log_ratio", "sampled_difference", "sampled_trained", "trained", "tokens", "computed",
    "cells", "pairs",
)  # fmt: skip
_MAXIMA = ("ratio", "negative_ratio", "sampled_difference", "seconds")


class UpdateStatistics:
    """The statistics of one step's updates, on one rank until `reduced`."""

    def __init__(self, device: torch.device) -> None:
        """Nothing was computed yet. `device`: where the policy is."""
        self._device = device
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in _SUMS}
        self._maxima = {name: torch.full((), -math.inf, dtype=torch.float64, device=device) for name in _MAXIMA}

    @property
    def loss(self) -> Tensor:
        """This rank's part of the summed loss so far; once not finite, always."""
        return self._sums["loss"]

    @torch.no_grad()
    def add(
        self,
        batch: MicroBatch,
        logprobs_N: Tensor,
        entropies_N: Tensor,
        parts: Objective,
        *,
        first: bool,
    ) -> None:
        """Count one micro-batch of this rank.

        Args:
            batch: as it was computed; one without tokens (`pack` of nothing) adds nothing.
            logprobs_N: under the weights that learn.
            entropies_N: of the distributions that they are of.
            parts: what the objective made of them.
            first: it is of the first mini-batch of the step.
        """
        mask_N = batch.mask_N
        log_ratio_N = _counted((logprobs_N - batch.behaviour_N).double(), mask_N)
        ratio_N = log_ratio_N.exp()
        trained = mask_N.sum()
        self._sum("loss", parts.loss)
        self._sum("kl", -log_ratio_N.sum())
        self._sum("kl_k3", k3_kl(torch.zeros_like(log_ratio_N), log_ratio_N).sum())
        self._sum("reference_kl", parts.reference_kl)
        self._sum("entropy", _counted(entropies_N, mask_N).sum())
        self._sum("clipped", parts.clipped)
        self._sum("clipped_high", parts.clipped_high)
        self._sum("corrected", parts.corrected)
        self._sum("correction", parts.correction)
        self._sum("ratio", _counted(ratio_N, mask_N).sum())
        self._sum("squared_ratio", _counted(ratio_N.square(), mask_N).sum())
        self._sum("squared_log_ratio", log_ratio_N.square().sum())
        self._sum("trained", trained)
        self._sum("tokens", batch.num_tokens)
        self._sum("computed", batch.num_computed)
        self._sum("cells", batch.num_cells if batch.num_tokens else 0)
        self._sum("pairs", batch.num_pairs)
        self._max("ratio", _counted(ratio_N, mask_N, -math.inf).amax())
        self._max("negative_ratio", _counted(-ratio_N, mask_N, -math.inf).amax())
        if first:
            self._sum("sampled_difference", log_ratio_N.abs().sum())
            self._sum("sampled_trained", trained)
            self._max("sampled_difference", log_ratio_N.abs().amax())

    def reduced(
        self,
        world_size: int,
        seconds: float,
        flops: ModelFlops | None = None,
        peak_flops: float | None = None,
    ) -> LearnStats:
        """The statistics of all ranks together; the same ones on each. All ranks at once.

        Args:
            world_size: how many ranks there are; with 1 there need not be a process group.
            seconds: that the updates took on this rank; the slowest counts.
            flops: what the policy's arithmetic costs; without, nothing is said of it.
            peak_flops: operations a second that one rank's device can do; without, no `mfu`.

        Returns:
            What `PolicyUpdate.run` tells, but for `lr`, `grad_norm` and `updates`; `loss` is the sum still.
        """
        self._max("seconds", max(seconds, 1e-9))
        sums_K = torch.stack([self._sums[name] for name in _SUMS])
        maxima_K = torch.stack([self._maxima[name] for name in _MAXIMA])
        if world_size > 1:
            dist.all_reduce(sums_K)
            dist.all_reduce(maxima_K, op=dist.ReduceOp.MAX)
        sums = dict(zip(_SUMS, sums_K.tolist(), strict=True))
        maxima = dict(zip(_MAXIMA, maxima_K.tolist(), strict=True))
        return _token_statistics(sums, maxima) | _speed(sums, maxima["seconds"], world_size, flops, peak_flops)

    def _sum(self, name: str, value: Tensor | float) -> None:
        self._sums[name] += value

    def _max(self, name: str, value: Tensor | float) -> None:
        # `maximum` keeps a NaN, as sums do.
        value = torch.as_tensor(value, dtype=torch.float64, device=self._device)
        self._maxima[name] = torch.maximum(self._maxima[name], value)


def _token_statistics(sums: dict[str, float], maxima: dict[str, float]) -> LearnStats:
    # In `max`, a NaN that comes first stays one.
    trained = sums["trained"]
    mean = {name: value / max(1.0, trained) for name, value in sums.items()}
    return {
        "loss": sums["loss"],
        "kl": mean["kl"],
        "kl_k3": mean["kl_k3"],
        "reference_kl": mean["reference_kl"],
        "entropy": mean["entropy"],
        "clip_fraction": mean["clipped"],
        "clip_fraction_low": mean["clipped"] - mean["clipped_high"],
        "clip_fraction_high": mean["clipped_high"],
        "correction_fraction": mean["corrected"],
        "correction_weight": mean["correction"],
        # Where nothing was trained there is no ratio; 1 is what it would be if nothing had changed.
        "ratio_mean": mean["ratio"] if trained else 1.0,
        "ratio_min": -maxima["negative_ratio"] if trained else 1.0,
        "ratio_max": maxima["ratio"] if trained else 1.0,
        "ratio_ess": sums["ratio"] ** 2 / (trained * sums["squared_ratio"]) if trained else 1.0,
        "log_ratio_std": math.sqrt(max(mean["squared_log_ratio"] - mean["kl"] ** 2, 0.0)),
        "logprob_abs_diff": sums["sampled_difference"] / max(1.0, sums["sampled_trained"]),
        "logprob_abs_diff_max": max(maxima["sampled_difference"], 0.0),
        "tokens_trained": trained,
        "tokens_total": sums["tokens"],
        "shared_fraction": 1 - sums["computed"] / sums["tokens"] if sums["tokens"] else 0.0,
        "padding_fraction": 1 - sums["computed"] / sums["cells"] if sums["cells"] else 0.0,
    }


def _speed(
    sums: dict[str, float], seconds: float, world_size: int, flops: ModelFlops | None, peak_flops: float | None
) -> LearnStats:
    speed = {"seconds": seconds, "tokens_per_s": sums["tokens"] / seconds}
    if flops is not None:
        rate = flops.training(sums["computed"], sums["trained"], sums["pairs"]) / seconds
        speed["tflops_per_s"] = rate / 1e12
        if peak_flops is not None:
            speed["mfu"] = rate / (world_size * peak_flops)
    return speed


def _counted(values_N: Tensor, mask_N: Tensor, otherwise: float = 0.0) -> Tensor:
    return torch.where(mask_N, values_N, torch.full_like(values_N, otherwise))
