"""`TrainState` of a DeepSpeed engine, whichever optimizer it has made of AdamW: whole float32 tensors in and out.

DeepSpeed keeps AdamW's tensors in one of four ways: as they are (float32 without ZeRO), one float32 copy for each
parameter (bfloat16 without ZeRO), or flat and in parts (ZeRO 1 and 2; ZeRO 3). Its own accessors find a parameter in
the flat ones, but only after the first step, which makes the moments; so `begin_write` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from raygym.errors import LearnerStateError
from raygym.learner_state import TrainState

_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_state(engine: Any, accessors: ModuleType, zero_stage: int) -> TrainState:
    """The state behind an engine.

    Args:
        engine: what `deepspeed.initialize` gave, with torch's AdamW inside, or DeepSpeed's for the CPU.
        accessors: `deepspeed.utils`.
        zero_stage: of its config.
    """
    if zero_stage == 3:
        return _ZeRO3(engine, accessors)
    if zero_stage or hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        return _FlatState(engine, accessors)
    return _WholeState(engine)


class _State:
    """What all of them share."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # The policy's own names, without that of the module around it.
        named = engine.module.policy.named_parameters()
        self._parameters: dict[str, Any] = {name: p for name, p in named if p.requires_grad}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of `TrainState`."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    def optimizer_steps(self) -> int:
        """Of `TrainState`."""
        states = self._adamw().state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def _adamw(self) -> Any:
        # DeepSpeed's optimizers wrap the one that they were given.
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _make_moments(self, masters: list[Tensor], optimizer_steps: int) -> None:
        adamw = self._adamw()
        # torch's counts in a tensor beside the moments (the fused one needs it there), DeepSpeed's own in an integer.
        in_tensor = isinstance(adamw, torch.optim.AdamW)
        for master in masters:
            adamw.state[master] = {
                "step": torch.tensor(float(optimizer_steps), device=master.device) if in_tensor else optimizer_steps,
                **{moment: torch.zeros_like(master) for moment in _MOMENTS},
            }


class _WholeState(_State):
    """Without ZeRO: every rank has all of every tensor."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        optimizer = engine.optimizer
        self._masters: dict[str, Tensor] = dict(self._parameters)
        if hasattr(optimizer, "fp32_groups"):
            copies = {
                id(low): master
                for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                for low, master in zip(lows, masters, strict=True)
            }
            self._masters = {name: copies[id(p)] for name, p in self._parameters.items()}

    def read(self, name: str, kind: str) -> Tensor:
        master = self._masters[name]
        if kind == "weight":
            return master.detach().cpu()
        found = self._adamw().state.get(master, {}).get(kind)
        return torch.zeros(master.shape) if found is None else found.detach().cpu()

    def begin_write(self, optimizer_steps: int) -> None:
        self._make_moments(list(self._masters.values()), optimizer_steps)

    def write(self, name: str, kind: str, value: Tensor) -> None:
        master = self._masters[name]
        target = master if kind == "weight" else self._adamw().state[master][kind]
        with torch.no_grad():
            target.copy_(value)

    def end_write(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._masters[name])


class _SharedOut(_State):
    """ZeRO: each rank has a part, and DeepSpeed's accessors read the whole. All ranks at once."""

    def __init__(self, engine: Any, accessors: ModuleType) -> None:
        super().__init__(engine)
        self._accessors = accessors

    def read(self, name: str, kind: str) -> Tensor:
        return _read_whole(self._accessors, self._parameters[name], kind, self.shapes()[name], self.optimizer_steps())


class _FlatState(_SharedOut):
    """ZeRO 1 and 2: each rank has a part of what all parameters are when laid end to end."""

    def begin_write(self, optimizer_steps: int) -> None:
        optimizer = self._engine.optimizer
        flat = "single_partition_of_fp32_groups"
        # ZeRO 1 with gradients that are accumulated in float32 is another class of DeepSpeed's.
        masters = getattr(optimizer, flat if hasattr(optimizer, flat) else "fp32_groups_flat_partition")
        self._make_moments(masters, optimizer_steps)
        # Otherwise the next step would do it, and keep its hands off what is linked by then.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()

    def write(self, name: str, kind: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        if kind == "weight":
            self._accessors.safe_set_full_fp32_param(parameter, value)
        else:
            self._accessors.safe_set_full_optimizer_state(parameter, value, kind)

    def end_write(self) -> None:
        self._engine.optimizer.update_lp_params()


class _ZeRO3(_SharedOut):
    """ZeRO 3: each rank has a part of every tensor, of equal size; the last one's may be filled up."""

    def begin_write(self, optimizer_steps: int) -> None:
        optimizer = self._engine.optimizer
        if optimizer.swap_optimizer:
            raise LearnerStateError(
                "the optimizer's state is offloaded to NVMe, into which raygym cannot load a checkpoint; resume with "
                "learner.deepspeed.zero_optimization.offload_optimizer.device: cpu"
            )
        self._make_moments(optimizer.fp32_partitioned_groups_flat, optimizer_steps)
        # Weights that are kept whole between uses are put back into parts, which is where they are copied to.
        optimizer.checkpoint_event_prologue()

    def write(self, name: str, kind: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        # By parts, since the accessor for whole tensors fails where they cannot be cut evenly.
        size = parameter.ds_tensor.numel()
        start = torch.distributed.get_rank() * size
        part = value.flatten()[start : start + size]
        part = torch.nn.functional.pad(part, (0, size - len(part)))
        if kind == "weight":
            self._accessors.safe_set_local_fp32_param(parameter, part)
        else:
            self._accessors.safe_set_local_optimizer_state(parameter, part, kind)

    def end_write(self) -> None:
        optimizer = self._engine.optimizer
        for group in range(len(optimizer.fp16_groups)):  # from the float32 parts to those that the policy computes with
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def _read_whole(accessors: ModuleType, parameter: Any, kind: str, shape: tuple[int, ...], steps: int) -> Tensor:
    if kind != "weight" and not steps:
        return torch.zeros(shape)  # they are made by the first step
    weight = kind == "weight"
    value: Tensor = (
        accessors.safe_get_full_fp32_param(parameter)
        if weight
        else accessors.safe_get_full_optimizer_state(parameter, kind)
    )
    return value.detach().cpu()
