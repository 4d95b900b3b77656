"""The commands as functions: `import raygym as rg`, then `rg.train`, `rg.rollout`, `rg.make`.

They work in scripts, in notebooks and inside a running event loop: a run lives in a process of its own, which ends with
the caller, and what it prints appears where the caller prints.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium

from raygym.command_process import run_command
from raygym.config import ConfigError, RunConfig
from raygym.config_file import build_config, dump_config, load_config
from raygym.env import EnvError, make_env
from raygym.results import Rollout, Run

Config = RunConfig | str | os.PathLike[str] | Mapping[str, Any]
"""A run config: as an object, a YAML file, or what such a file holds."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Single values of a config: `["learner.lr=1e-5"]` or `{"learner.lr": 1e-5}`."""
Split = Literal["train", "validation"]


def train(
    config: Config,
    overrides: Overrides = (),
    *,
    fresh: bool = False,
    allow_config_change: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a policy as `raygym train` does, and wait for the end; goes on where a run of its name was interrupted.

    Args:
        config: the run's. Environments `module:Class` are imported from the working directory or PYTHONPATH, so in a
            notebook write their module with `%%writefile my_env.py`.
        overrides: of the config.
        fresh: an earlier run of this name is moved aside instead.
        allow_config_change: it goes on also where the config has changed.
        quiet: nothing is printed.

    Returns:
        The run: its folder, summary, metrics and trajectories.

    Raises:
        ConfigError: a key, a value or an input is wrong; nothing was begun.
        RunFailed: it failed; the text is the cause.
        KeyboardInterrupt: it was interrupted, and everything was stopped; calling it again goes on.

    Example:
        >>> run = rg.train("configs/demo.yaml", {"steps": 5})
        >>> run.validation_reward
        {0: 0.067, 5: 0.281}
    """
    checked = as_config(config, overrides)
    flags = ["--fresh"] * fresh + ["--allow-config-change"] * allow_config_change
    _run("train", checked, flags, quiet=quiet)
    return Run(checked.run_dir)


def rollout(
    config: Config | None = None,
    overrides: Overrides = (),
    *,
    policy: str | os.PathLike[str] | None = None,
    env: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    tasks: int | None = None,
    samples: int = 1,
    split: Split = "validation",
    temperature: float | None = None,
    success: float = 1.0,
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Rollout:
    """Play tasks without training, as `raygym rollout` does, and keep every trajectory.

    Args:
        config: a run's. It may be left out where `policy` and `env` are given.
        overrides: of the config.
        policy: `policy.model` in its place: a folder, such as a run's checkpoint, or a name.
        env: the one environment to play, in place of the config's `envs`.
        kwargs: of `env`.
        tasks: how many; by default `validation.tasks` of the config, or 64.
        samples: episodes of each task.
        split: which tasks.
        temperature: by default what the config says for the split.
        success: an episode with at least this reward is a success, for pass@k.
        out: the folder, in which an interrupted rollout goes on; by default a temporary one, which is removed when the
            result is not used any more.
        fresh: an earlier folder is moved aside instead of going on in it.
        quiet: nothing is printed.

    Returns:
        The episodes; iterate to read one at a time.

    Raises:
        ConfigError: a key, a value or an input is wrong; nothing was begun.
        RunFailed: it failed; the text is the cause.
        KeyboardInterrupt: it was interrupted; with `out`, everything that was whole is kept.

    Example:
        >>> played = rg.rollout(policy="smollm2-135m-instruct", env="raygym/NumberGuess-v0", tasks=8, samples=4)
        >>> [trajectory.reward for trajectory in played]
    """
    _require_counts(tasks=1 if tasks is None else tasks, samples=samples)
    _require_numbers(success=success, temperature=0.0 if temperature is None else temperature)
    if temperature is not None and temperature < 0:
        raise ConfigError(f"temperature: {temperature!r} is no number from 0")
    if split not in get_args(Split):
        raise ConfigError(f"split: {split!r} is none; expected one of: {', '.join(get_args(Split))}")
    checked = as_config(_rollout_config(config, policy, env, kwargs), overrides)
    options = [f"--samples={samples}", f"--split={split}", f"--success={success}"]
    options += [f"--tasks={tasks}"] if tasks is not None else []
    options += [f"--temperature={temperature}"] if temperature is not None else []
    options += ["--fresh"] if fresh else []
    if out is not None:
        _run("rollout", checked, [*options, f"--out={os.fspath(out)}"], quiet=quiet)
        return Rollout(Path(out))
    played = Rollout(tempfile.mkdtemp(prefix="raygym-rollout-"), temporary=True)
    _run("rollout", checked, [*options, f"--out={played.path}"], quiet=quiet)
    return played


def make(env_id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment in this process, to look at it or to debug it.

    Args:
        env_id: a registered id, or `module:Class`.
        **kwargs: what its constructor gets.

    Returns:
        The environment: `reset(seed=0)` gives the first messages, `step({"role": "assistant", "content": "..."})` the
        answer. Where its methods are `async def`, await them.

    Raises:
        EnvError: there is no such environment, or it refused its arguments.

    Example:
        >>> env = rg.make("raygym/NumberGuess-v0", high=20)
        >>> messages, info = env.reset(seed=0)
    """
    if not isinstance(env_id, str):
        raise EnvError(f"env_id: {env_id!r} is none; expected a registered id or a text 'module:Class'")
    return make_env(env_id, kwargs)


def as_config(config: Config, overrides: Overrides = ()) -> RunConfig:
    """The config in whichever form it is, with its overrides. Raises ConfigError."""
    changes = _changes(overrides)
    if isinstance(config, RunConfig):
        with tempfile.TemporaryDirectory(prefix="raygym-") as folder:
            # By way of a file: there, what follows from other keys still follows them when they are overridden.
            return load_config(_written(config, folder), changes) if changes else config
    if isinstance(config, Mapping):
        return build_config(config, changes)
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config: {config!r} is none; expected a YAML file's path, a mapping or a RunConfig")
    return load_config(Path(config), changes)


def _changes(overrides: Overrides) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={_as_json(key, value)}" for key, value in overrides.items()]
    if isinstance(overrides, str) or not isinstance(overrides, Sequence) or not all(map(_is_text, overrides)):
        raise ConfigError(f"overrides: {overrides!r} is none; expected a list such as ['steps=5'], or {{'steps': 5}}")
    return list(overrides)


def _as_json(key: str, value: Any) -> str:
    try:
        # Its way to write what is not finite would be only text to YAML.
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides: {key}: {error}; expected a value as JSON has them") from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _rollout_config(
    config: Config | None, policy: str | os.PathLike[str] | None, env: str | None, kwargs: Mapping[str, Any] | None
) -> Config:
    if env is None and kwargs is not None:
        raise ConfigError("kwargs: are those of env, which is missing; give both, or set envs in the config")
    if config is None:
        if policy is None or env is None:
            raise ConfigError("expected a config, or both policy and env")
        config = {"name": "rollout", "steps": 0, "policy": {"model": os.fspath(policy)}, "envs": [{"id": env}]}
    changes: dict[str, Any] = {}
    if policy is not None:
        changes["policy.model"] = os.fspath(policy)
    if env is not None:
        changes["envs"] = [{"id": env, "kwargs": dict(kwargs or {})}]
    return as_config(config, changes) if changes else config


def _require_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or int(count) < 1:
            raise ConfigError(f"{name}: {count!r} is no whole number from 1")


def _require_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise ConfigError(f"{name}: {number!r} is no finite number")


def _run(command: str, config: RunConfig, options: Sequence[str], *, quiet: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="raygym-") as folder:
        run_command([command, str(_written(config, folder)), *options], quiet=quiet)


def _written(config: RunConfig, folder: str) -> Path:
    path = Path(folder) / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path
