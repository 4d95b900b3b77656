"""Run configs from YAML files and dotted overrides, and back.

`load_config` is the only door: what it returns is valid, what it refuses is a `ConfigError` whose text names
the key, the value found and the value expected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from raygym.config import ConfigError, RunConfig
from raygym.method_config import MethodConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one YAML run config and apply `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing or not a YAML mapping, or a key or value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML run config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; expected a YAML run config") from error
    try:
        data = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (name, steps, policy, envs, ...)")
    return build_config(data, overrides, source=str(path))


def build_config(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config") -> RunConfig:
    """`load_config` of what is parsed already, and stays as it is. Raises ConfigError."""
    own = deepcopy(dict(data))
    for override in overrides:
        _apply_override(own, override)
    return parse_config(own, source)


def parse_config(data: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate an already parsed mapping. Raises ConfigError naming every wrong key."""
    try:
        # Through JSON mode: YAML has no tuples, and strict Python mode would refuse a list for `betas`.
        return RunConfig.model_validate(_tuples(data))
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every default written out; `load_config` reads it back equal, and takes the same overrides.

    Of the method only what was chosen is written. What `learner.algorithm` and `rollout` make of the rest is beside it
    in comments, so that it still follows them when they are overridden.
    """
    data = config.model_dump(mode="json")
    learner, chosen = data["learner"], {"algorithm", *config.learner.model_fields_set}
    resolved = {key: learner.pop(key) for key in MethodConfig.model_fields if key not in chosen}
    text = ""
    for name, section in data.items():
        text += yaml.safe_dump({name: section}, sort_keys=False)
        if name == "learner" and resolved:
            text += "  # resolved: what algorithm and rollout make of the keys that are not set here\n"
            lines = yaml.safe_dump(resolved, sort_keys=False).splitlines()
            text += "".join(f"  #   {line}\n" for line in lines)
    return text


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 (no dot) as text; YAML 1.2 and everybody who types it mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    learner = data.get("learner")
    if isinstance(learner, dict) and isinstance(learner.get("betas"), list):
        return {**data, "learner": {**learner, "betas": tuple(learner["betas"])}}
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value, such as learner.lr=1e-6")
    try:
        value = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    node: Any = data
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, override)
        if node is None:
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
    if isinstance(node, list):
        node[_index(node, leaf, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    return None


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"override {override!r}: {part!r} is not an index into a list of {len(items)} entries")
    return int(part)


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(item['loc'])}"
    if kind == "missing":
        return f"{key}: is required and missing"
    if kind == "value_error":
        return f"{key}.{message}" if key else message
    found = repr(item["input"])
    return f"{key}: {message[0].lower() + message[1:]}, found {found if len(found) < 80 else found[:77] + '...'}"


def _suggestion(loc: tuple[Any, ...]) -> str:
    model: Any = RunConfig
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        # A list of sections, or a section that may be left out.
        model = next((a for a in get_args(annotation) if hasattr(a, "model_fields")), annotation)
    known = ", ".join(model.model_fields)
    return f"; expected one of: {known}"
