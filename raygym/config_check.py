"""`raygym config check`: what is wrong with a run, and what it will need. Everything that it prints is YAML."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import replace

from raygym.architecture import published_models, read_architecture
from raygym.config import RunConfig
from raygym.config_file import dump_config
from raygym.estimate_report import report
from raygym.model_shape import ModelShape, UnknownShape, read_shape
from raygym.models import is_hub_id
from raygym.preflight import Checked, check_inputs, check_what_is_here
from raygym.roofline import H100
from raygym.run_estimate import Cluster, default_workload, estimate_run

# Fields of `Workload`, and the options that set them.
_WORKLOAD = {
    "turns": "turns",
    "tokens_per_turn": "tokens_per_turn",
    "observation_tokens": "observation_tokens",
    "env_s": "env_seconds",
}


def check(config: RunConfig, options: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    """Check a run.

    Args:
        config: the run's.
        options: parsed by `check_options`.

    Returns:
        What to print, and what is in the way of the run: one text each.

    Raises:
        ConfigError: something is wrong that nothing can be told beside.
    """
    checked = Checked(check_inputs(config).model_dir, ()) if options.strict else check_what_is_here(config)
    shape, policy, unknown = _shape(config, checked)
    gpu = replace(
        H100,
        name="H100 SXM"
        if (options.gpu_tflops, options.gpu_tb_per_s) == (H100.flops / 1e12, H100.bytes_per_s / 1e12)
        else "GPU",
        flops=options.gpu_tflops * 1e12,
        bytes_per_s=options.gpu_tb_per_s * 1e12,
        training_share=options.mfu,
    )
    cluster = Cluster(options.gpus_per_node, options.gpu_memory_gib, gpu, options.sync_gib_per_s)
    workload = default_workload(config, shape, options.prompt_tokens)
    asked = {name: getattr(options, option) for name, option in _WORKLOAD.items()}
    workload = replace(workload, **{name: value for name, value in asked.items() if value is not None})
    estimate = estimate_run(config, shape, cluster, workload)
    lines = [policy, *(f"not checked: {text}" for text in (*checked.missing, *unknown))]
    lines += report(config, estimate, cluster)
    return dump_config(config) + "".join(f"# {line}".rstrip() + "\n" for line in lines), estimate.problems


def _shape(config: RunConfig, checked: Checked) -> tuple[ModelShape | None, str, tuple[str, ...]]:
    """The policy's shape, what it is in one line, and why it is not known where it is not."""
    model = config.policy.model
    architecture = read_architecture(model, checked.model_dir)
    where = f"policy files: {checked.model_dir}" if checked.model_dir else f"policy: {model}"
    if architecture is None:
        near = difflib.get_close_matches(model, published_models(), n=2) if is_hub_id(model) else []
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        why = f"memory and time: nothing here says what {model} looks like; {hint}give a directory with its files"
        return None, where, (f"{why}, or use --strict, which downloads them",)
    try:
        shape = read_shape(architecture.config)
    except UnknownShape as error:
        return None, where, (f"memory and time: {error}",)
    active = f", {shape.active_parameters / 1e9:.3g} B for each token" if shape.experts else ""
    return shape, f"{where}, {shape.parameters / 1e9:.3g} B parameters{active} (by {architecture.source})", ()
