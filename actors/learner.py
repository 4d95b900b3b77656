"""One DeepSpeed rank, the `TrainEngine` of a `PolicyUpdate`. The only file that imports deepspeed."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygym.actors.deepspeed_state import deepspeed_state
from raygym.actors.weight_sender import WeightSender, take_part
from raygym.bound_store import Rendezvous, bound_store, listen
from raygym.build_locks import remove_stale_locks
from raygym.config import LearnerConfig
from raygym.deepspeed_options import offload_device, whole_config
from raygym.extension_folder import use_own_folder
from raygym.full_disk import is_full
from raygym.gradient_checkpointing import enable_gradient_checkpointing
from raygym.learner_state import Gang, TrainState, load_learner_state, save_learner_state
from raygym.lora import adapter_parameters, add_adapters, save_adapter, set_dropout, without_adapters
from raygym.model_flops import ModelFlops, known_peak_tflops
from raygym.packing import MicroBatch
from raygym.policy_model import TokenLogprobs
from raygym.policy_packing import Packing, choose_packing
from raygym.policy_weights import policy_weights
from raygym.sent_version import SentVersion
from raygym.testing import chaos
from raygym.types import Float32Array, LearnStats, TrainSequence
from raygym.update import PolicyUpdate, Reference
from raygym.weight_slots import OpenSlots
from raygym.weights import Manifest, Sending, WeightsError, plan_manifest

logger = logging.getLogger(__name__)


class Learner:
    """A rank of the gang. `setup` before anything else, on all ranks at once; so are all methods that say so."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        model_dir: str,
        config: LearnerConfig,
        temperature: float,
        total_updates: int | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.config = config
        self._model_dir = model_dir
        self._temperature = temperature
        self._total_updates = total_updates
        self._sender: WeightSender | None = None
        self._listening: socket.socket | None = None
        self._device = torch.device("cuda" if config.gpus_per_learner else "cpu")

    def rendezvous(self) -> Rendezvous:
        """Where rank 0 of the gang listens, on this node's address; asked of it alone."""
        self._listening = listen(ray.util.get_node_ip_address())
        host, port = self._listening.getsockname()[:2]
        return host, port

    def setup(self, rendezvous: Rendezvous) -> tuple[str, int]:
        """Join the gang at rank 0's `rendezvous` and load the policy. All ranks at once.

        Returns:
            This process: the node that it is on, and its id there.

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
        # Imported here: it picks its accelerator on import.
        # DeepSpeed looks for ninja on the PATH; last, since another version of ninja would compile everything again.
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
        remove_stale_locks(use_own_folder())
        import deepspeed

        self._deepspeed = deepspeed
        backend, timeout = "nccl" if config.gpus_per_learner else "gloo", timedelta(seconds=config.update_timeout_s)
        store = bound_store(rendezvous, self.world_size, timeout, self._listening)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        # It takes the group that is there.
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        self.policy = self._load_policy()
        if config.lora is not None:
            add_adapters(self.policy, config.lora)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.policy)
        model = TokenLogprobs(self.policy)
        packing = choose_packing(model, config.packing)
        logger.info("learner.packing: %s", packing.name)
        flops = ModelFlops.of(self.policy)
        optimizer = self._make_optimizer(model)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._deepspeed_config())
        optimizer.state.clear()
        # For one rank it would copy all gradients to and fro.
        self._engine.enable_backward_allreduce &= self.world_size > 1 or not self._plain_optimizer
        self._update = PolicyUpdate(
            config,
            self,
            self._temperature,
            packing=packing,
            rank=self.rank,
            world_size=self.world_size,
            device=self._device,
            reference=self._starting_policy(packing) if config.kl_coef else None,
            total_updates=self._total_updates,
            flops=flops,
            peak_flops=self._peak_flops(),
        )
        # Without a cluster, as in a benchmark, Ray would start one to answer this.
        return self.weight_node() if ray.is_initialized() else "", os.getpid()

    @property
    def _plain_optimizer(self) -> bool:
        """The optimizer is PyTorch's own, of the policy's own parameters: DeepSpeed has none between."""
        return self.config.zero_stage == 0 and self.config.dtype == "float32"

    def _peak_flops(self) -> float | None:
        """What this rank's device can do in `dtype`, operations a second."""
        tflops = self.config.peak_tflops
        if tflops is None and self._device.type == "cuda" and self.config.dtype == "bfloat16":
            tflops = known_peak_tflops(torch.cuda.get_device_name())
        return tflops * 1e12 if tflops is not None else None

    def _make_optimizer(self, model: TokenLogprobs) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # lr is set before every step. It is 0 until then, since DeepSpeed's bf16 optimizer without ZeRO makes a step of
        # its own when it is built: it must move nothing, nor count in Adam's bias correction (0.73 of the first step).
        options: dict[str, Any] = {"lr": 0.0, "betas": self.config.betas, "weight_decay": self.config.weight_decay}
        if offload_device(self.config.deepspeed, "offload_optimizer") == "none":
            return torch.optim.AdamW(trained, fused=True, **options)
        offloaded: torch.optim.Optimizer = self._deepspeed.ops.adam.DeepSpeedCPUAdam(trained, **options)
        return offloaded

    def _starting_policy(self, packing: Packing) -> Reference:
        if self.config.lora is not None:
            return without_adapters(self._engine.module)
        reference = TokenLogprobs(self._load_policy())
        choose_packing(reference, packing.name)
        return reference

    def _load_policy(self) -> Any:
        policy: Any = AutoModelForCausalLM.from_pretrained(
            self._model_dir,
            dtype=getattr(torch, self.config.dtype),
            # A policy's folder is data: no code that came with it, and no pickle.
            trust_remote_code=False,
            use_safetensors=True,
        )
        # eval: dropout would make the learner's logprobs differ from the engines'.
        return policy.to(self._device).eval()

    def _deepspeed_config(self) -> dict[str, Any]:
        clip = 0.0 if self._plain_optimizer else self.config.grad_clip  # see `step`
        return whole_config(self.config.deepspeed, bf16=self.config.dtype == "bfloat16", grad_clip=clip)

    def update(self, sequences: Sequence[TrainSequence]) -> LearnStats:
        """One step's optimizer updates; see `PolicyUpdate.run`. All ranks at once."""
        chaos.at("learner.update.begin")
        stats = self._update.run(sequences)
        chaos.at("learner.update.end")
        return stats

    def token_logprobs(self, sequences: Sequence[TrainSequence]) -> dict[int, Float32Array]:
        """Logprobs of the trained tokens of this rank's share; see `PolicyUpdate.token_logprobs`. All ranks at once."""
        return self._update.token_logprobs(sequences)

    def learned_logprobs(self) -> dict[int, Float32Array]:
        """What this rank has computed of its share in the last update; see `PolicyUpdate.learned_logprobs`."""
        return self._update.learned_logprobs()

    def reference_logprobs(self, sequences: Sequence[TrainSequence]) -> dict[int, Float32Array]:
        """The same under the starting policy; see `PolicyUpdate.reference_logprobs`. All ranks at once."""
        return self._update.reference_logprobs(sequences)

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Of `TrainEngine`."""
        if self.config.lora is not None and self.config.lora.dropout:
            set_dropout(self.policy, torch.is_grad_enabled())
        logprobs_N, entropies_N = self._engine(batch, self._temperature)
        return logprobs_N, entropies_N

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Of `TrainEngine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """Of `TrainEngine`."""
        chaos.at("learner.update.mid")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm: Tensor | None = None
        if self._plain_optimizer:
            # Then DeepSpeed clips without telling the norm. Gradients are whole and reduced by now.
            trained = [p for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if not norm.isfinite():
                return float(norm)
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.grad_clip, norm)
        # Its other optimizers look at the norm themselves, and step only where it is finite.
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def ping(self) -> int:
        """A sign of life: the rank."""
        return self.rank

    def weight_specs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Hugging Face name and whole shape of every parameter, in order; a tied tensor once, under its first name."""
        return [(name, weight.shape) for name, weight in policy_weights(self.policy).items()]

    @torch.no_grad()
    def iter_weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named weights, whole, adapters merged, of `learner.dtype`, on this rank's device.

        All ranks at once, to the end.

        Under ZeRO-3 the names are gathered together, so a call should name one bucket. A tensor is valid until the
        iterator has ended, and may be the live parameter itself: read it, do not keep it.
        """
        weights = policy_weights(self.policy)
        with self._gathered([parameter for name in names for parameter in weights[name].parameters]):
            for name in names:
                yield name, weights[name].merged()

    def _gathered(self, parameters: list[Any]) -> AbstractContextManager[Any]:
        if self.config.zero_stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(parameters)
        return gathered

    def weight_manifest(self, bucket_bytes: int) -> Manifest:
        """What every version that this learner publishes consists of. The same on all ranks."""
        return plan_manifest(self.weight_specs(), self.config.dtype, bucket_bytes)

    def weight_node(self) -> str:
        """Ray's ID of the node that this rank is on."""
        return str(ray.get_runtime_context().get_node_id())

    def open_slots(self, paths: list[str], base: int) -> None:
        """Rank 0 writes what it publishes there; the arguments are those of `OpenSlots`."""
        slots = OpenSlots(paths, base)
        if self._sender is None:
            self._sender = WeightSender(slots)
        self._sender.slots = slots

    def drop_slots(self) -> None:
        """Let go of the memory of a store that is gone, so that there is room for its successor's."""
        if self._sender is not None:
            self._sender.slots = None

    def join_weight_group(self, group_name: str, world_size: int, timeout_s: float) -> None:
        """Rank 0 becomes the sender of the weight group; see `WeightSender.join`."""
        assert self._sender is not None, "open_slots() first"
        self._sender.join(group_name, world_size, timeout_s)

    def publish_weights(
        self,
        manifest: Manifest,
        slot: int,
        buckets: Sequence[int],
        sending: Sending,
        timeout_s: float,
    ) -> SentVersion:
        """Send buckets of the current weights; rank 0, and under ZeRO-3 all ranks at once. See `WeightSender.send`.

        Raises:
            WeightsError: the weights are not those after so many updates.
        """
        if sending.updates is not None and sending.updates != self._update.updates:
            raise WeightsError(f"the learners have made {self._update.updates} updates since, not {sending.updates}")
        if self.rank != 0:
            take_part(manifest, self.iter_weights, buckets)
            return SentVersion()
        assert self._sender is not None, "open_slots() first"
        sent = self._sender.send(manifest, self.iter_weights, slot, buckets, timeout_s, sending)
        sent.updates = self._update.updates
        return sent

    def save_hf(self, path: str) -> None:
        """Write a Hugging Face directory: weights, config, tokenizer, generation config. All ranks at once.

        With `learner.lora` the weights are merged ones, and a folder `adapter` holds the adapters in peft's format.

        Rank 0 writes, to a name beside `path` that is renamed when whole. The parent must be reachable from rank 0's
        node. A directory already at `path` is replaced.
        """
        state: dict[str, Tensor] = {}
        for name, _ in self.weight_specs():
            for _, weight in self.iter_weights([name]):
                if self.rank == 0:
                    state[name] = weight.to("cpu", copy=True).contiguous()
        adapters: dict[str, Tensor] = {}
        for name, parameter in adapter_parameters(self.policy).items():
            with self._gathered([parameter]):
                adapters[name] = parameter.detach().to("cpu", copy=True)
        with self._others_wait():
            if self.rank == 0:
                self._write_hf(Path(path), state, adapters)

    def _write_hf(self, final: Path, state: dict[str, Tensor], adapters: dict[str, Tensor]) -> None:
        partial = final.with_name(final.name + ".partial")
        try:
            chaos.at("disk.policy")
            known = {name for name, _ in self.policy.named_parameters(remove_duplicate=False)}
            state |= {name: value.cpu() for name, value in self.policy.state_dict().items() if name not in known}
            shutil.rmtree(partial, ignore_errors=True)
            self.policy.save_pretrained(partial, state_dict=state)
            AutoTokenizer.from_pretrained(self._model_dir).save_pretrained(partial)
            if adapters:
                save_adapter(self.policy, adapters, self._model_dir, partial / "adapter")
            if final.exists():
                shutil.rmtree(final)
            partial.replace(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def save_state(self, path: str) -> None:
        """Write weights, optimizer and random generators to the folder `path`, on rank 0's node. All ranks at once."""
        chaos.at("learner.save_state")
        with self._others_wait():
            save_learner_state(Path(path), self._train_state(), self._update.updates, self._gang())

    @contextmanager
    def _others_wait(self) -> Iterator[None]:
        """All ranks leave this when rank 0 has written its files, also where its disk was full: the gang goes on."""
        try:
            yield
        except Exception as error:
            if is_full(error):
                dist.barrier()
            raise
        dist.barrier()

    def load_state(self, path: str) -> None:
        """Go on from what `save_state` wrote, also with other ranks or another ZeRO stage. All ranks at once.

        Raises:
            LearnerStateError: it is not one of this policy.
        """
        self._update.updates = load_learner_state(Path(path), self._train_state(), self._gang())

    def _train_state(self) -> TrainState:
        return deepspeed_state(self._engine, self._deepspeed.utils, self.config.zero_stage)

    def _gang(self) -> Gang:
        return Gang(self.rank, self.world_size, self._device.type)

    def close(self) -> None:
        """Leave the gang. All ranks at once; nothing works afterwards."""
        if self._sender is not None:
            self._sender.join("", 0, 0.0)
        if dist.is_initialized():
            dist.destroy_process_group()
