"""The command: every check, a line each, and what to do."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType

from raygym.doctor import accelerator, machine, packages, services, toolchain
from raygym.doctor.finding import Check, Finding, Level, examine

QUICK: Mapping[str, Check] = MappingProxyType(
    {
        "python": toolchain.python,
        "compiler": toolchain.compiler,
        "DeepSpeed's op": toolchain.compiled_op,
        "cores": machine.cores,
        "memory": machine.memory,
        "shared memory": machine.shared_memory,
        "limits": machine.limits,
        "disk": machine.disk,
        "clock": machine.clock,
        "GPU": accelerator.gpus,
        "packages": packages.declared,
        "lock": packages.locked,
        "vLLM": packages.engine,
        "ports": services.ports,
        "proxy": services.proxies,
        "chaos": services.chaos,
        "NeMo Gym": services.nemo_gym,
    }
)
SLOW: Mapping[str, Check] = MappingProxyType({"Ray": services.ray, "imports": packages.imports})
"""These start processes that import large packages."""
EXAMPLE = "example: raygym doctor --quick"
TEXT = "check this machine, and tell what to do"

_NAME_WIDTH = 20
_LEVEL_WIDTH = 9
_COLOURS = {Level.OK: "32", Level.WARNING: "33", Level.PROBLEM: "31"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--quick", action="store_true", help="without imports of large packages, in a second")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.epilog = EXAMPLE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command by itself, without what other commands import. Exit code 1 where there is a problem."""
    parser = argparse.ArgumentParser(prog="raygym doctor", description=f"{TEXT[0].upper()}{TEXT[1:]}.")
    add_options(parser)
    options = parser.parse_args(arguments)
    return doctor(quick=options.quick, as_json=options.json)


def doctor(*, quick: bool = False, as_json: bool = False, checks: Mapping[str, Check] | None = None) -> int:
    """Run the checks and print what they say.

    Args:
        quick: without those that take seconds.
        as_json: `{"problems": 0, "warnings": 1, "findings": [{"name", "level", "found", "advice"}]}`.
        checks: in place of all, for tests.

    Returns:
        1 where there is a problem, else 0.
    """
    findings = examine(checks or {**QUICK, **({} if quick else SLOW)})
    told = list(findings) if as_json else _print(findings)
    problems = sum(finding.level is Level.PROBLEM for finding in told)
    warnings = sum(finding.level is Level.WARNING for finding in told)
    if as_json:
        found = [asdict(finding) for finding in told]
        print(json.dumps({"problems": problems, "warnings": warnings, "findings": found}, indent=2))
    else:
        print(f"\n{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    return 1 if problems else 0


def _print(findings: Iterable[Finding]) -> list[Finding]:
    """A line each, as they come, and below it what to do."""
    told = []
    colours = sys.stdout.isatty()
    width = max(60, shutil.get_terminal_size().columns) if colours else sys.maxsize
    indent = _LEVEL_WIDTH + _NAME_WIDTH
    for finding in findings:
        told.append(finding)
        level = finding.level.value.ljust(_LEVEL_WIDTH)
        if colours:
            level = f"\033[{_COLOURS[finding.level]}m{level}\033[0m"
        first, *rest = _wrapped(finding.found, width - indent)
        print(f"{level}{finding.name.ljust(_NAME_WIDTH - 1)} {first}", flush=True)
        for line in [*rest, *(_wrapped(f"-> {finding.advice}", width - indent) if finding.advice else [])]:
            print(" " * indent + line)
    return told


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"
