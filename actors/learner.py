"""One DeepSpeed rank as a Ray actor. The only file that imports deepspeed.

An update is exact whatever the number of ranks, the ZeRO stage and the micro-batches: token losses are summed and
divided by what the whole mini-batch amounts to, which every rank knows, since every rank gets the whole batch.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygym.actors.collective import join_group, leave_group
from raygym.actors.weight_sender import send_version
from raygym.algorithms.losses import k1_kl
from raygym.algorithms.objective import loss_divisor, objective
from raygym.config import LearnerConfig
from raygym.packing import MicroBatch, assign_micro_batches, pack, packed_order
from raygym.policy_model import TokenLogprobs, check_model
from raygym.types import Float32Array, TrainSequence
from raygym.weights import Manifest, plan_manifest

LearnStats = dict[str, float]
"""What `LearnerActor.update` returns."""

_SUMS = ("loss", "kl", "reference_kl", "entropy", "clip_fraction")


class LearnerActor:
    """A rank of the gang. `setup` before anything else, on all ranks at once; so are all methods that say so."""

    def __init__(self, rank: int, world_size: int, model_dir: str, config: LearnerConfig, temperature: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.config = config
        self._model_dir = model_dir
        self._temperature = temperature
        self._updates = 0
        self._weight_group = ""
        self._device = torch.device("cuda" if config.gpus_per_learner else "cpu")

    def ping(self) -> int:
        """The rank."""
        return self.rank

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a free port on it; asked of rank 0."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def setup(self, rendezvous: tuple[str, int]) -> None:
        """Join the gang at rank 0's `rendezvous` and load the policy. All ranks at once.

        Raises:
            ValueError: the policy is not one that the learner computes exactly.
        """
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK="0",  # Ray shows a GPU actor its own devices only
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=rendezvous[0],
            MASTER_PORT=str(rendezvous[1]),
        )
        if not config.gpus_per_learner:
            os.environ["DS_ACCELERATOR"] = "cpu"
        # Imported here: it takes seconds, the driver needs only this class, and it picks its accelerator on import.
        # DeepSpeed looks for ninja on the PATH; last, since another version of ninja would compile everything again.
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
        import deepspeed

        self._deepspeed = deepspeed
        deepspeed.init_distributed(
            dist_backend="nccl" if config.gpus_per_learner else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=config.update_timeout_s),
        )
        self.policy = self._load_policy()
        self._reference = TokenLogprobs(self._load_policy()) if config.kl_coef else None
        model = TokenLogprobs(self.policy)
        check_model(model)
        # lr is set before every step. It is 0 until then, since DeepSpeed's bf16 optimizer without ZeRO makes a step of
        # its own when it is built: it must move nothing, nor count in Adam's bias correction (0.73 of the first step).
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._deepspeed_config())
        optimizer.state.clear()

    def _load_policy(self) -> Any:
        policy: Any = AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=getattr(torch, self.config.dtype))
        # eval: dropout would make the learner's logprobs differ from the engines'.
        return policy.to(self._device).eval()

    def _deepspeed_config(self) -> dict[str, Any]:
        return {
            "bf16": {"enabled": self.config.dtype == "bfloat16"},
            "steps_per_print": 2**31,
            "zero_force_ds_cpu_optimizer": False,
            **self.config.deepspeed,
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": 1,
            # Micro-batches differ in number from update to update, so the boundary is set by hand instead.
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.grad_clip,
        }

    def update(self, sequences: Sequence[TrainSequence]) -> LearnStats:
        """Make `mini_batches` optimizer updates from one step's sequences, in group order. All ranks at once.

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
            `padding_fraction` (of all computed positions), `seconds`.
        """
        started = time.monotonic()
        # loss ... clip_fraction, |diff|, tokens, cells; reduced over ranks once, at the end.
        totals = torch.zeros(len(_SUMS) + 3, dtype=torch.float64, device=self._device)
        worst = torch.zeros((), dtype=torch.float64, device=self._device)
        divisors, trained, first_trained, norms = 0.0, 0, 0, []
        for number, part in enumerate(np.array_split(np.arange(len(sequences)), self.config.mini_batches)):
            mini_batch = [sequences[index] for index in part]
            divisor = loss_divisor(self.config, mini_batch)
            computed = self._with_signal(mini_batch)
            sums, differences = self._accumulate_gradients(computed, divisor)
            totals += sums
            divisors += divisor
            trained += (with_gradient := sum(int(sequence.loss_mask.sum()) for sequence in computed))
            if number == 0:
                totals[len(_SUMS)] = differences.sum()
                worst, first_trained = differences.amax(), with_gradient
            norms.append(self._step())
        dist.all_reduce(totals)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        *sums_, difference, tokens, cells = totals.tolist()
        return {
            **{name: value / max(1, trained) for name, value in zip(_SUMS, sums_, strict=True)},
            "loss": sums_[0] / max(1.0, divisors),
            "grad_norm": sum(norms) / len(norms),
            "lr": self._lr(self._updates - 1),
            "logprob_abs_diff": difference / max(1, first_trained),
            "logprob_abs_diff_max": worst.item(),
            "tokens_trained": float(trained),
            "tokens_total": tokens,
            "padding_fraction": 1 - tokens / cells if cells else 0.0,
            "seconds": time.monotonic() - started,
        }

    def _with_signal(self, mini_batch: list[TrainSequence]) -> list[TrainSequence]:
        # Without a KL term, an advantage of 0 gives a gradient of exactly 0: nothing need be computed for it. One is
        # kept where none has signal, so that every rank still steps and the engine is still compared.
        if self.config.kl_coef:
            return mini_batch
        return [sequence for sequence in mini_batch if sequence.advantage != 0.0] or mini_batch[:1]

    def _micro_batches(self, sequences: Sequence[TrainSequence]) -> list[tuple[int, ...]]:
        lengths = [len(sequence.token_ids) for sequence in sequences]
        return assign_micro_batches(lengths, self.world_size, self.config.tokens_per_micro_batch)[self.rank]

    def _accumulate_gradients(self, mini_batch: list[TrainSequence], divisor: float) -> tuple[Tensor, Tensor]:
        """This rank's backward passes. Returns its totals (see `update`) and |learner - engine| of its tokens."""
        micro_batches = self._micro_batches(mini_batch)
        totals = torch.zeros(len(_SUMS) + 3, dtype=torch.float64, device=self._device)
        differences = [torch.zeros(1, dtype=torch.float64, device=self._device)]
        for number, indices in enumerate(micro_batches):
            batch = pack([mini_batch[index] for index in indices]).to(self._device)
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            logprobs_N, entropies_N = self._engine(batch, self._temperature)
            loss, sums, difference_N = self._loss(batch, logprobs_N, entropies_N)
            # DeepSpeed averages gradients over ranks; ours are parts of one sum.
            self._engine.backward(loss * (self.world_size / max(1.0, divisor)))
            totals[: len(_SUMS)] += sums
            totals[-2] += batch.num_tokens
            totals[-1] += batch.num_cells if indices else 0
            differences.append(difference_N.double())
        return totals, torch.cat(differences)

    def _loss(self, batch: MicroBatch, logprobs_N: Tensor, entropies_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, the sums named by `_SUMS`, and |learner - engine| of each token."""
        reference_N = None
        if self._reference is not None:
            with torch.no_grad():
                reference_N, _ = self._reference(batch, self._temperature)
        loss, reference_kl, clipped = objective(self.config, batch, logprobs_N, reference_N)
        behaviour_kl_N = k1_kl(batch.behaviour_N, logprobs_N.detach()) * batch.mask_N
        entropy = (entropies_N * batch.mask_N).sum()
        sums = [loss.detach(), behaviour_kl_N.sum(), reference_kl, entropy, clipped]
        return loss, torch.stack([value.double() for value in sums]), behaviour_kl_N.abs()

    def _lr(self, update: int) -> float:
        return self.config.lr * min(1.0, (update + 1) / max(1, self.config.warmup_steps))

    def _step(self) -> float:
        """One optimizer update. Returns the gradient's norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._lr(self._updates)
        norm: Any = None
        if self.config.zero_stage == 0 and self.config.dtype == "float32":
            # Without ZeRO DeepSpeed clips without telling the norm; gradients are whole and reduced by now.
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        self._updates += 1
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[TrainSequence]) -> dict[int, Float32Array]:
        """Logprobs of the trained tokens under the current weights. All ranks at once.

        Returns:
            For each sequence of this rank's share: its index -> T logprobs, 0 where the mask is False.
        """
        found: dict[int, Float32Array] = {}
        for indices in self._micro_batches(sequences):
            share = [sequences[index] for index in indices]
            logprobs_N = self._engine(pack(share).to(self._device), self._temperature)[0].cpu().numpy()
            start = 0
            for item in packed_order(share):
                sequence, result = share[item], np.zeros(len(share[item].token_ids), dtype=np.float32)
                count = int(sequence.loss_mask.sum())
                result[sequence.loss_mask] = logprobs_N[start : start + count]
                found[indices[item]] = result
                start += count
        return found

    def weight_specs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Hugging Face name and whole shape of every parameter, in order; a tied tensor once, under its first name."""
        # Under ZeRO-3 a parameter's own shape is empty between uses; DeepSpeed keeps the whole one aside.
        return [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self.policy.named_parameters()]

    @torch.no_grad()
    def iter_weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named weights, whole, as contiguous CPU tensors of `learner.dtype`. All ranks at once, to the end.

        Under ZeRO-3 the names are gathered together, so a call should name one bucket. A tensor is valid until the
        next one is asked for, and may be the live parameter itself: read it, do not keep it.
        """
        parameters = dict(self.policy.named_parameters())
        with self._gathered([parameters[name] for name in names]):
            for name in names:
                yield name, parameters[name].detach().cpu().contiguous()

    def _gathered(self, parameters: list[Any]) -> AbstractContextManager[Any]:
        if self.config.zero_stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(parameters)
        return gathered

    def weight_manifest(self, bucket_bytes: int) -> Manifest:
        """What every version that this learner publishes consists of. The same on all ranks."""
        return plan_manifest(self.weight_specs(), self.config.dtype, bucket_bytes)

    def join_weight_group(self, group_name: str, world_size: int, timeout_s: float) -> None:
        """Rank 0 becomes the sender of the weight group; other ranks have nothing to do."""
        if self.rank == 0:
            join_group(group_name, 0, world_size, timeout_s)
            self._weight_group = group_name

    def publish_weights(self, manifest: Manifest) -> dict[str, int]:
        """Broadcast the current weights to the engines; all ranks at once. Rank 0 returns each tensor's checksum."""
        return send_version(manifest, self.iter_weights, self._weight_group if self.rank == 0 else None)

    def save_hf(self, path: str) -> None:
        """Write a Hugging Face directory: weights, config, tokenizer, generation config. All ranks at once.

        Rank 0 writes, to a name beside `path` that is renamed when whole. The parent must be reachable from rank 0's
        node. A directory already at `path` is replaced.
        """
        state: dict[str, Tensor] = {}
        for name, _ in self.weight_specs():
            for _, weight in self.iter_weights([name]):
                if self.rank == 0:
                    state[name] = weight.clone()
        if self.rank == 0:
            known = {name for name, _ in self.policy.named_parameters(remove_duplicate=False)}
            state |= {name: value.cpu() for name, value in self.policy.state_dict().items() if name not in known}
            final = Path(path)
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            self.policy.save_pretrained(partial, state_dict=state)
            AutoTokenizer.from_pretrained(self._model_dir).save_pretrained(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.replace(final)
        dist.barrier()

    def close(self) -> None:
        """Leave the gang. All ranks at once; nothing works afterwards."""
        leave_group(self._weight_group)
        if dist.is_initialized():
            dist.destroy_process_group()
