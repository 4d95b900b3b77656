"""`learner.deepspeed`: what may be in it. DeepSpeed is not imported: that takes seconds, and picks an accelerator."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Offloaded = Literal["offload_optimizer", "offload_param"]

# Keys that raygym computes itself, from the batch and the rank count, or has keys of its own for.
_OWNED = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        "is set by raygym from the batch; remove it",
    ),
    "gradient_clipping": "is set by raygym from learner.grad_clip; remove it",
    "optimizer": "is AdamW, set by raygym from learner.lr, betas and weight_decay; remove it",
    "scheduler": "is set by raygym from learner.lr_schedule; remove it",
    "gradient_allreduce_op": "is the mean, which raygym counts on; remove it",
    **dict.fromkeys(
        ("fp16", "bfloat16", "amp", "torch_autocast"), "the precision is learner.dtype: float32 or bfloat16; remove it"
    ),
    "tensor_parallel": "needs ranks that compute the same tokens, but each learner has micro-batches of its own; "
    "remove it, and share weights among learners by zero_optimization: {stage: 3}",
}
# What DeepSpeed itself reads from the top of its config; it ignores all else without a word.
TOP_LEVEL = frozenset([
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "communication_data_type", "compile",
    "csv_monitor", "data_types", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel",
    "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "seq_parallel_communication_data_type", "sparse_gradients", "steps_per_print", "tensor_parallel", "tensorboard",
    "timers", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
])  # fmt: skip
_OFFLOAD_STAGES: dict[Offloaded, tuple[int, ...]] = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
_ZERO_CLASSES = {
    "": ("config.py", "DeepSpeedZeroConfig"),
    "offload_optimizer": ("offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "offload_param": ("offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
}


def check_deepspeed(options: Mapping[str, Any]) -> None:
    """Check a config's mapping `deepspeed` for what raygym sets itself, and for what cannot work with it.

    Raises:
        ValueError: the text begins with the key.
    """
    for key, problem in _OWNED.items():
        if key in options:
            raise ValueError(f"deepspeed.{key} {problem}")
    if "enabled" in _mapping(options, "deepspeed", "bf16"):
        raise ValueError("deepspeed.bf16.enabled is set by raygym from learner.dtype; remove it")
    _mapping(options, "deepspeed", "data_types")
    zero = _mapping(options, "deepspeed", "zero_optimization")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError("deepspeed.zero_optimization must be a mapping with stage: 0, 1, 2 or 3")
    if zero.get("compute_grad_norm", True) is not True:
        raise ValueError(
            f"deepspeed.zero_optimization.compute_grad_norm: {zero['compute_grad_norm']!r} leaves no norm, by which "
            "raygym clips gradients (learner.grad_clip) and refuses an update that is not finite; remove it"
        )
    for key, stages in _OFFLOAD_STAGES.items():
        section = _mapping(zero, "deepspeed.zero_optimization", key)
        where, device = f"deepspeed.zero_optimization.{key}", section.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise ValueError(f"{where}.device: expected none, cpu or nvme, found {device!r}")
        if device == "nvme" and not section.get("nvme_path"):
            raise ValueError(f"{where}.nvme_path: missing; device: nvme needs a folder on a local disk of every node")
        allowed = (3,) if device == "nvme" else stages
        if device != "none" and zero.get("stage", 0) not in allowed:
            raise ValueError(
                f"{where}: device: {device} needs ZeRO stage {' or '.join(map(str, allowed))}; found "
                f"deepspeed.zero_optimization.stage: {zero.get('stage', 0)}"
            )


def whole_config(options: Mapping[str, Any], *, bf16: bool, grad_clip: float) -> dict[str, Any]:
    """DeepSpeed's whole config: a run's options, and what raygym sets.

    Args:
        options: checked by `check_deepspeed`.
        bf16: weights are bf16, not fp32.
        grad_clip: largest norm of the gradients; 0 where DeepSpeed should not clip.
    """
    chosen: dict[str, Any] = {"steps_per_print": 2**31, **options}
    if bf16 and (options.get("zero_optimization") or {}).get("stage", 0):
        # Micro-batches add up in fp32. Without ZeRO DeepSpeed knows only gradients of the weights' own dtype.
        chosen["data_types"] = {"grad_accum_dtype": "fp32", **(options.get("data_types") or {})}
    return {
        **chosen,
        "bf16": {**(options.get("bf16") or {}), "enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,
        # Micro-batches differ in number from update to update, so the boundary is set by hand instead.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
    }


def offload_device(options: Mapping[str, Any], key: Offloaded) -> str:
    """Where DeepSpeed keeps the optimizer's states or the parameters: `none` (with the rank), `cpu` or `nvme`."""
    section = options.get("zero_optimization", {}).get(key) or {}
    return str(section.get("device", "none"))


def unloadable_state(options: Mapping[str, Any]) -> str | None:
    """Why a gang with these options cannot load a checkpoint; None where it can."""
    if offload_device(options, "offload_optimizer") != "nvme":
        return None
    return (
        "learner.deepspeed.zero_optimization.offload_optimizer.device: with nvme no checkpoint can be loaded, so the "
        "run can neither be resumed nor outlive a lost learner; with cpu it can, also from checkpoints made with nvme"
    )


def unknown_option(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first key that DeepSpeed does not have; None where it has all of them.

    Looked at are the top, where DeepSpeed ignores mistakes, and `zero_optimization`, whose keys are read from the
    installed source.
    """
    zero = _mapping(options, "deepspeed", "zero_optimization")
    sections: dict[str, tuple[Mapping[str, Any], Collection[str]]] = {"deepspeed": (options, TOP_LEVEL)}
    for name in _ZERO_CLASSES:
        where = f"deepspeed.zero_optimization{'.' + name if name else ''}"
        sections[where] = (zero.get(name) or {} if name else zero, zero_fields(name))
    for where, (section, known) in sections.items():
        for key in section:
            if known and key not in known:
                near = difflib.get_close_matches(str(key), known, n=2)
                if where == "deepspeed" and key in zero_fields(""):
                    near = [f"zero_optimization.{key}"]
                hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(sorted(known))}"
                return f"{where}.{key}: DeepSpeed has no such option; {hint}"
    return None


@cache
def zero_fields(section: str) -> frozenset[str]:
    """Keys of `zero_optimization` (section "") or of one of its two offload sections; empty without DeepSpeed."""
    spec = find_spec("deepspeed")
    file, name = _ZERO_CLASSES[section]
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / "runtime" / "zero" / file
    if not source.is_file():
        return frozenset()
    found: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    found |= {field.target.id, *_alias(field.value)}
    return frozenset(found)


def _alias(default: ast.expr | None) -> list[str]:
    keywords = default.keywords if isinstance(default, ast.Call) else []
    return [str(word.value.value) for word in keywords if word.arg == "alias" and isinstance(word.value, ast.Constant)]


def _mapping(options: Mapping[str, Any], where: str, key: str) -> Mapping[str, Any]:
    section = options.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{where}.{key} must be a mapping, found {section!r}")
    return section
