"""NeMo Gym's config, resolved by its own code: files merged, `${...}` filled in, references checked."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raygym.nemo_gym.config import NemoGymConfig, NemoGymError
from raygym.nemo_gym.interpreter import clean_environment, find_interpreter

TRAINING_MODEL = "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"
_TIMEOUT_S = 120
# Runs in NeMo Gym's Python; reads the mapping to merge from stdin. Offline: raygym chooses the ports.
_SCRIPT = """
import json, os, sys
try:
    import nemo_gym
    from nemo_gym.global_config import GlobalConfigDictParser, GlobalConfigDictParserConfig
    from omegaconf import OmegaConf
    options = GlobalConfigDictParserConfig(
        initial_global_config_dict=OmegaConf.create(json.load(sys.stdin)),
        skip_load_from_cli=True, skip_load_from_dotenv=True, offline=True,
    )
    config = OmegaConf.to_container(GlobalConfigDictParser().parse(options), resolve=True)
    answer = {"config": config, "root": os.path.dirname(os.path.dirname(nemo_gym.__file__))}
except Exception as error:
    answer = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(answer))
"""


@dataclass(frozen=True, slots=True)
class Policy:
    """How NeMo Gym's model servers reach the policy."""

    base_url: str
    """Ends in `/v1`."""
    model: str
    api_key: str = field(default="-", repr=False)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config with nothing left to fill in but the ports."""

    config: dict[str, Any] = field(repr=False)
    """Has the policy's key in it."""
    root: Path
    """The folder that NeMo Gym is installed in; its own relative paths begin there."""
    interpreter: str


def resolve(section: NemoGymConfig, policy: Policy) -> Resolved:
    """Resolve the files of `config_paths` with `overrides` and the policy's address.

    Raises:
        NemoGymError: a file is missing or wrong, a reference leads nowhere, or NeMo Gym itself cannot be imported.
    """
    interpreter = find_interpreter(section.interpreter)
    paths = list(section.config_paths)
    if not any("responses_api_models/" in path for path in paths):
        paths.append(TRAINING_MODEL)
    given = {
        **nested(section.overrides),
        "config_paths": paths,
        "policy_base_url": policy.base_url,
        "policy_api_key": policy.api_key,
        "policy_model_name": policy.model,
    }
    answer = _ask(interpreter, given)
    if "error" in answer:
        files = ", ".join(section.config_paths)
        said = _line(answer["error"])
        if policy.api_key != "-":
            said = said.replace(policy.api_key, "<the policy's key>")  # an error may show what it was given
        raise NemoGymError(f"config_paths: NeMo Gym refuses {files}: {said}")
    return Resolved(answer["config"], Path(answer["root"]), interpreter)


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1, "a": {"c": 2}}` as `{"a": {"b": 1, "c": 2}}`. Raises NemoGymError where two keys contradict."""
    tree: dict[str, Any] = {}
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise NemoGymError(f"overrides: {path!r} goes into {part!r}, which another override makes a value")
        if isinstance(value, Mapping):
            inner = node.setdefault(leaf, {})
            if not isinstance(inner, dict):
                raise NemoGymError(f"overrides: {path!r} is given as a value and as a mapping")
            inner.update(nested(value))
        else:
            node[leaf] = value
    return tree


def _ask(interpreter: str, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [interpreter, "-I", "-c", _SCRIPT],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=clean_environment(),
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NemoGymError(f"interpreter: {interpreter} cannot resolve a config: {_line(str(error))}") from error
    except (IndexError, ValueError) as error:
        said = _line(done.stderr) or f"exit status {done.returncode}"
        raise NemoGymError(f"interpreter: {interpreter} cannot resolve a config: {said}") from error
    return answer


def _line(text: str) -> str:
    return " ".join(text.split())[-600:]
