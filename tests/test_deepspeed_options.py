"""What DeepSpeed has no option for, compared with DeepSpeed's own source."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_config import MINIMAL

from raygym.config import ConfigError
from raygym.config_file import parse_config
from raygym.deepspeed_options import TOP_LEVEL, unknown_option, whole_config, zero_fields
from raygym.preflight import check_inputs


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **options}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_optimisation": {"stage": 3}}, ["deepspeed.zero_optimisation", "did you mean zero_optimization?"]),
        ({"stage": 3}, ["deepspeed.stage", "did you mean zero_optimization.stage?"]),
        (zero(offload_optimiser={}), ["zero_optimization.offload_optimiser", "offload_optimizer"]),
        (zero(offload_param={"device": "cpu", "pinned": True}), ["offload_param.pinned", "pin_memory"]),
        (zero(offload_optimizer={"ratio": 0.3, "x": 1}), ["offload_optimizer.x", "expected one of", "ratio"]),
    ],
)
def test_a_mistyped_option_is_named(options: dict[str, Any], words: list[str]) -> None:
    problem = unknown_option(options)
    assert problem is not None and all(word in problem for word in words), problem


def test_what_deepspeed_knows_is_let_through() -> None:
    every = {name: True for name in TOP_LEVEL}
    assert unknown_option({**every, "zero_optimization": dict.fromkeys(zero_fields(""), None)}) is None
    assert (
        unknown_option(zero(stage3_prefetch_bucket_size=0, offload_param={"device": "cpu", "nvme_path": "x"})) is None
    )


def test_every_known_key_is_one_that_the_installed_deepspeed_reads() -> None:
    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    sources = [*root.glob("runtime/**/*.py"), *root.glob("*/co*.py"), *root.glob("profiling/*.py")]
    named = {word for path in sources for word in re.findall(r"[\"'](\w+)[\"']", path.read_text(encoding="utf-8"))}
    assert named >= TOP_LEVEL, TOP_LEVEL - named
    assert {"stage", "stage3_max_live_parameters", "offload_param"} <= zero_fields("")
    assert {"device", "nvme_path", "pin_memory"} <= zero_fields("offload_param") & zero_fields("offload_optimizer")


def test_it_is_told_before_a_run_starts() -> None:
    config = parse_config({**MINIMAL, "learner": {"deepspeed": {"zero_optimisation": {}}}})
    with pytest.raises(ConfigError, match=r"learner\.deepspeed\.zero_optimisation"):
        check_inputs(config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_users_data_types_leave_accumulation_in_fp32(stage: int) -> None:
    options = {"zero_optimization": {"stage": stage}, "data_types": {"keep_in_fp32_modules": ["norm"]}}
    whole = whole_config(options, bf16=True, grad_clip=1.0)
    assert whole["data_types"] == {"keep_in_fp32_modules": ["norm"], "grad_accum_dtype": "fp32"}
    chosen = {**options, "data_types": {"grad_accum_dtype": "bf16"}}
    assert whole_config(chosen, bf16=True, grad_clip=1.0)["data_types"] == {"grad_accum_dtype": "bf16"}
    assert whole_config({}, bf16=True, grad_clip=1.0).get("data_types") is None  # DeepSpeed has no such thing there
    assert whole_config(options, bf16=False, grad_clip=1.0)["data_types"] == options["data_types"]


def test_what_raygym_sets_wins() -> None:
    whole = whole_config({"bf16": {"check_grad_overflow": True}, "steps_per_print": 5}, bf16=True, grad_clip=0.5)
    assert whole["bf16"] == {"check_grad_overflow": True, "enabled": True}
    assert (whole["steps_per_print"], whole["gradient_clipping"], whole["gradient_accumulation_steps"]) == (5, 0.5, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, ["deepspeed.tensor_parallel", "same tokens", "stage: 3"]),
        (zero(compute_grad_norm=False), ["zero_optimization.compute_grad_norm: False", "learner.grad_clip", "remove"]),
        ({"data_types": "fp32"}, ["deepspeed.data_types", "mapping", "'fp32'"]),
    ],
)
def test_what_cannot_work_with_raygym_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "learner": {"deepspeed": options}})
    assert all(word in str(caught.value) for word in words), caught.value
    assert parse_config({**MINIMAL, "learner": {"deepspeed": zero(compute_grad_norm=True)}}).learner.zero_stage == 3
