"""Python, and what DeepSpeed compiles its op with."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from raygym.doctor.finding import Finding, ok, problem, warning

_PYTHONS = ((3, 11), (3, 12))
_TIMEOUT_S = 60.0


def python() -> Iterator[Finding]:
    """The interpreter and the system below it."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] not in _PYTHONS:
        yield problem("python", text, "use Python 3.11 or 3.12")
    elif sys.prefix == sys.base_prefix:
        yield warning("python", f"{text}, no virtual environment", "use one (make setup, or python3.11 -m venv)")
    else:
        yield ok("python", text)
    system = f"{platform.system()} {platform.machine()}"
    if system == "Linux x86_64":
        yield ok("system", f"{system}, {platform.release()}")
    else:
        yield warning("system", system, "raygym is tested on Linux x86_64 only")


def compiler() -> Iterator[Finding]:
    """A C++ compiler that finds Python's headers, and ninja."""
    name = os.environ.get("CXX", "c++")
    headers = sysconfig.get_path("include")
    if shutil.which(name) is None:
        yield problem("compiler", f"no {name}", "install g++ (Debian: apt install g++); DeepSpeed compiles an op")
    else:
        done = subprocess.run(
            [name, "-std=c++17", "-fsyntax-only", "-I", headers, "-x", "c++", "-"],
            input="#include <Python.h>\n#include <vector>\n",
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        if not (Path(headers) / "Python.h").is_file():
            advice = f"install them (Debian: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
            yield problem("compiler", f"{name}, but no Python.h in {headers}", advice)
        elif done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            yield problem("compiler", f"{name} does not compile: {first}", "install g++ 9 or newer with its library")
        else:
            yield ok("compiler", f"{shutil.which(name)}, with Python's headers")
    if (ninja := shutil.which("ninja")) is None:
        beside = Path(sys.executable).with_name("ninja")
        advice = f"put {beside.parent} on the PATH" if beside.exists() else "pip install ninja"
        yield problem("ninja", "not on the PATH", f"{advice}; DeepSpeed compiles with it")
    else:
        yield ok("ninja", ninja)


def compiled_op() -> Iterator[Finding]:
    """DeepSpeed's op, compiled once for each environment; and locks of compiles that were killed."""
    locks = importlib.import_module("raygym.build_locks")
    try:
        folder: Path = importlib.import_module("raygym.extension_folder").own_folder()
    except PackageNotFoundError as error:
        yield warning("DeepSpeed's op", f"{error.name} is not installed", "see the packages above")
        return
    found = sorted(folder.glob("**/deepspeed_shm_comm.so"))
    if found:
        yield ok("DeepSpeed's op", f"compiled, in {found[-1].parent}")
    else:
        advice = "the first start compiles it, one to two minutes; `make setup` does it before"
        yield warning("DeepSpeed's op", f"not compiled in {folder} (only learners without a GPU use it)", advice)
    stale = locks.stale_locks(folder)
    if stale:
        advice = f"a run's start removes it by itself; other programs wait for it for ever: rm {stale[0]}"
        yield warning("compile locks", f"{len(stale)} left behind by a compile that was killed", advice)
    else:
        yield ok("compile locks", "none left behind")
