"""Whether the engine knows the options that a config passes through to it; told without starting or importing it."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from raygym.config import ConfigError, PolicyConfig
from raygym.simulate import SimulatedConfig

_ARGUMENT_CLASSES = ("EngineArgs", "AsyncEngineArgs")


def check_engine_options(config: PolicyConfig) -> None:
    """Check `policy.vllm` and `policy.simulated`.

    Raises:
        ConfigError: a key that the engine does not have, or a value that raygym itself reads and cannot use.
    """
    try:
        SimulatedConfig(**config.simulated)
    except ValidationError as error:
        raise ConfigError(_simulated_problem(error)) from error
    known = vllm_argument_names()
    if known:
        for key in config.vllm:
            if key not in known:
                raise ConfigError(_unknown("policy.vllm", key, known))
    if config.engine == "vllm":
        _check_parallelism(config)
    length = config.vllm.get("max_model_len", 2)
    if type(length) is not int or length < 2:
        raise ConfigError(f"policy.vllm.max_model_len: expected an integer of at least 2 tokens, found {length!r}")


def _check_parallelism(config: PolicyConfig) -> None:
    """Ray gives an engine `gpus_per_replica` GPUs, and vLLM starts a process for each rank of both its sizes."""
    ranks = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = config.vllm.get(key, 1)
        if type(size) is not int or size < 1:
            raise ConfigError(f"policy.vllm.{key}: expected a number of GPUs from 1, found {size!r}")
        ranks *= size
    gpus = config.gpus_per_replica
    if gpus == ranks or gpus == 0 or (gpus < 1 and ranks == 1):
        return
    raise ConfigError(
        f"policy.gpus_per_replica: {gpus:g}, but an engine's tensor_parallel_size x pipeline_parallel_size "
        f"(policy.vllm) is {ranks}; expected the two to be equal"
    )


def _simulated_problem(error: ValidationError) -> str:
    # A mistyped key is named before the one that is missing because of it.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *sections, key = ["policy.simulated", *(str(part) for part in problem["loc"])]
    if problem["type"] == "extra_forbidden":
        return _unknown(".".join(sections), key, _simulated_fields(sections[1:]))
    where = ".".join([*sections, key])
    if problem["type"] == "value_error":
        return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "missing":
        return f"{where}: is required and missing"
    return f"{where}: {problem['msg']}, found {problem['input']!r}"


def _simulated_fields(sections: list[str]) -> Collection[str]:
    model: Any = SimulatedConfig
    for section in sections:
        annotation = model.model_fields[section].annotation
        model = next((part for part in get_args(annotation) if hasattr(part, "model_fields")), annotation)
    fields: Collection[str] = model.model_fields
    return fields


@cache
def vllm_argument_names() -> frozenset[str]:
    """The fields of vLLM's AsyncEngineArgs, read from the installed source; empty where that cannot be found.

    Importing vLLM would take ten seconds, which is long for a typing mistake.
    """
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    if not source.is_file():
        return frozenset()
    return frozenset(
        field.target.id
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in _ARGUMENT_CLASSES
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _unknown(section: str, key: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; expected one of: {', '.join(sorted(known)[:20])}"
    return f"{section}.{key}: the engine has no such option{hint}"
