"""The command line. Exit codes: 0 done, 1 failed, 2 bad usage or config, 130 interrupted."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

import raygym
from raygym.argument_types import at_least_one
from raygym.check_options import add_options
from raygym.config import ConfigError, RunConfig
from raygym.config_file import load_config
from raygym.doctor import command as doctor_command
from raygym.errors import RaygymError
from raygym.help_format import Command
from raygym.live_console import Verbosity
from raygym.rollout_store import Request

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_OVERRIDES = "key.path=value"
_WITH_OVERRIDES = f"%(prog)s [options] config [{_OVERRIDES} ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _options(arguments)
    if options.command == "env":
        return _check_env(options.id, options.kwargs, options.turns)
    if options.command == "doctor":
        return doctor_command.doctor(quick=options.quick, as_json=options.json)
    if options.command == "report":
        return _report(options.run, options.out)
    try:
        if options.command == "rollout":
            return _rollout(options)
        if options.command == "train":
            return _train(options)
        if options.command == "view":
            importlib.import_module("raygym.viewer.command").view(options.path, options.port, opens=options.open)
            return DONE
        config = load_config(options.config, options.overrides)
        if options.command == "config":
            return _check(config, options)
        return _run(options.command, config)
    except ConfigError as error:
        print(f"raygym: {error}", file=sys.stderr)
        return BAD_USAGE


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more of the overrides once an option stood between them.
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Command(
        prog="raygym",
        description="Train language-model agents by reinforcement learning on Ray.",
        epilog="example: raygym train configs/demo.yaml learner.lr=1e-5",
    )
    parser.add_argument("--version", action="version", version=f"raygym {raygym.__version__}", help="print it and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train a policy and write runs/<name>/"),
        ("eval", "play the held-out tasks once and print the result as JSON"),
        ("serve", "serve a policy over an OpenAI-compatible HTTP API"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        _with_config(command, name)
        if name == "train":
            _with_verbosity(command)
            command.description = "Train a policy and write runs/<name>/; goes on from its last checkpoint."
            command.add_argument("--fresh", action="store_true", help="move an earlier run aside instead of going on")
            command.add_argument(
                "--allow-config-change", action="store_true", help="go on also where the config has changed"
            )
    _add_rollout(commands)
    text = "show a run, a rollout or a file of trajectories as a local web page"
    viewer = commands.add_parser("view", help=text, description=text[0].upper() + text[1:] + ", until Ctrl-C.")
    viewer.add_argument("path", type=Path, help="such as runs/demo")
    viewer.add_argument("--port", type=int, metavar="N", help="on 127.0.0.1; 0: any free one (default: 8642, if free)")
    viewer.add_argument("--open", action="store_true", help="open it in the browser")
    viewer.epilog = "example: raygym view runs/demo --open"
    _add_report(commands)
    config = commands.add_parser("config", help="check a run config", description="Work with run configs.")
    config.epilog = "example: raygym config check configs/demo.yaml seed=1"
    check = config.add_subparsers(dest="config_command", required=True, metavar="COMMAND").add_parser(
        "check",
        help="validate it, print it whole, tell what the run needs",
        description="Validate a run config, print it whole, and tell what the run needs.",
    )
    _with_config(check, "config check")
    add_options(check)
    env = commands.add_parser("env", help="check an environment", description="Work with environments.")
    env.epilog = "example: raygym env check my_env:Guess"
    check = env.add_subparsers(dest="env_command", required=True, metavar="COMMAND").add_parser(
        "check",
        help="play it as a run would, and tell what is wrong",
        description="Play an environment as a run would, and tell what is wrong with it.",
        epilog="example: raygym env check my_env:Guess --kwargs '{high: 50}'",
    )
    check.add_argument("id", help="a registered id, or module:Class")
    check.add_argument("--kwargs", default="{}", metavar="YAML", help="what its constructor gets")
    check.add_argument("--turns", type=int, default=64, help="by when an episode must have ended (default: 64)")
    text = doctor_command.TEXT
    doctor_command.add_options(commands.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + "."))
    return parser


def _with_config(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument("config", help="a YAML run config")
    parser.add_argument("overrides", nargs="*", metavar=_OVERRIDES, help="change single values of the config")
    parser.usage = _WITH_OVERRIDES
    parser.epilog = f"example: raygym {command} configs/demo.yaml seed=1"


def _with_verbosity(parser: argparse.ArgumentParser) -> None:
    how_much = parser.add_mutually_exclusive_group()
    told: dict[str, Any] = {"dest": "verbosity", "action": "store_const", "default": Verbosity.NORMAL}
    how_much.add_argument(
        "-q", "--quiet", const=Verbosity.QUIET, help="tell only what goes wrong, and the result", **told
    )
    how_much.add_argument("-v", "--verbose", const=Verbosity.VERBOSE, help="tell also what is logged", **told)


def _add_rollout(commands: Any) -> None:
    text = "play tasks without training and keep their trajectories"
    parser = commands.add_parser(
        "rollout", help=text, description=text[0].upper() + text[1:] + "; goes on where it was."
    )
    _with_config(parser, "rollout")
    _with_verbosity(parser)
    parser.epilog = "example: raygym rollout configs/demo.yaml --tasks 100 --samples 8"
    parser.add_argument(
        "--tasks", type=at_least_one, metavar="N", help="default: validation.tasks of the config, or 64"
    )
    parser.add_argument("--samples", type=at_least_one, metavar="K", default=1, help="episodes of each (default: 1)")
    splits = ("train", "validation")
    parser.add_argument(
        "--split", choices=splits, default=splits[1], metavar="SPLIT", help="train or validation (default)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="default: what the config says for the split")
    parser.add_argument("--success", type=float, metavar="R", default=1.0, help="its reward, for pass@k (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: rollouts/<name of the run>")
    parser.add_argument("--fresh", action="store_true", help="move an earlier folder aside instead of going on in it")


def _add_report(commands: Any) -> None:
    text = "write a run's curves, config and episodes as one web page"
    parser = commands.add_parser("report", help=text, description=text[0].upper() + text[1:] + ", and as Markdown.")
    parser.epilog = "example: raygym report runs/demo"
    parser.add_argument("run", type=Path, help="a run's or a rollout's folder, ended or not")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put report.html and report.md (default: it)")


def _report(run: Path, out: Path | None) -> int:
    try:
        for path in importlib.import_module("raygym.report.command").write_report(run, out):
            print(path)
    except RaygymError as error:
        print(f"raygym: {error}", file=sys.stderr)
        return BAD_USAGE
    return DONE


def _rollout(options: argparse.Namespace) -> int:
    if options.temperature is not None:
        section = "validation" if options.split == "validation" else "rollout"
        options.overrides.append(f"{section}.temperature={options.temperature}")
    config = load_config(options.config, options.overrides)
    request = Request(options.tasks or config.validation.tasks or 64, options.samples, options.split)

    def play(config: RunConfig, model_dir: str) -> None:
        command = importlib.import_module("raygym.actors.rollout_command")
        command.rollout(
            config, model_dir, request, options.out, options.success, fresh=options.fresh, verbosity=options.verbosity
        )

    return _run("rollout", config, play)


def _train(options: argparse.Namespace) -> int:
    def train(config: RunConfig, model_dir: str) -> None:
        runs = importlib.import_module("raygym.actors.runs")
        runs.train(
            config,
            model_dir,
            fresh=options.fresh,
            allow_config_change=options.allow_config_change,
            verbosity=options.verbosity,
        )

    return _run("train", load_config(options.config, options.overrides), train)


def _check(config: RunConfig, options: argparse.Namespace) -> int:
    text, problems = importlib.import_module("raygym.config_check").check(config, options)
    print(text, end="")
    for problem in problems:
        print(f"raygym: {problem}", file=sys.stderr)
    return BAD_USAGE if problems else DONE


def _check_env(env_id: str, kwargs_text: str, turns: int) -> int:
    try:
        kwargs = yaml.safe_load(kwargs_text)
    except yaml.YAMLError:
        kwargs = None
    if not isinstance(kwargs, dict):
        print(f"raygym: --kwargs: {kwargs_text!r} is no mapping; expected YAML such as '{{high: 50}}'", file=sys.stderr)
        return BAD_USAGE
    env, check = importlib.import_module("raygym.env"), importlib.import_module("raygym.check_env")
    try:
        env.find_env(env_id)
    except env.EnvError as error:
        print(f"raygym: {error}", file=sys.stderr)
        return BAD_USAGE
    problems = check.check_env(env_id, kwargs, max_turns=turns)
    print(*(f"- {problem}" for problem in problems), sep="\n") if problems else print(f"{env_id}: nothing is wrong")
    return FAILED if problems else DONE


def _run(command: str, config: RunConfig, act: Callable[[RunConfig, str], None] | None = None) -> int:
    # SIGINT too: a shell's background job starts with it ignored, and would then not be stoppable.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        # Ray and the engines take seconds to import: only commands that use them pay, and bad input is told at once.
        prepared = importlib.import_module("raygym.preflight").check_inputs(config, learns=command == "train")
        runs = importlib.import_module("raygym.actors.runs")
        try:
            act = act or {"eval": runs.evaluate, "serve": runs.serve}[command]
            act(config, prepared.model_dir)
        except ConfigError:
            raise
        except Exception as error:
            if os.environ.get("RAYGYM_TRACEBACK"):
                raise
            print(f"raygym: {command} failed: {runs.cause(error)}", file=sys.stderr)
            for note in getattr(error, "__notes__", ()):
                print(f"raygym: {note}", file=sys.stderr)
            if (logs := runs.kept_logs()) is not None:
                print(f"raygym: Ray's logs of it are kept in {logs}", file=sys.stderr)
            print("raygym: set RAYGYM_TRACEBACK=1 for the whole traceback", file=sys.stderr)
            return FAILED
    except KeyboardInterrupt:
        print("raygym: interrupted; everything was stopped", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
