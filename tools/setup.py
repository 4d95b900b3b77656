"""Set up this checkout: virtual environment, locked packages, DeepSpeed's CPU op, the demo policy's files.

`make` runs it before every target. It needs only the standard library, does what is missing and nothing else, and may
be interrupted at any point: the next call goes on. When all is there it returns at once (see `_is_ready`).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements" / "cpu.txt"
STAMP = VENV / "raygym-setup.json"
LOG = VENV / "raygym-setup.log"
LOCKED_FOR = "3.11"
POLICY = "smollm2-135m-instruct"
NEEDED_GB = 8
STEPS = 5

_PROBE = """
import json, os, sys, sysconfig
try:
    import ensurepip, venv
    has_venv = True
except ImportError:
    has_venv = False
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print(json.dumps({"version": "%d.%d" % sys.version_info[:2], "headers": headers, "venv": has_venv}))
"""
# Compiled at the first DeepSpeed start on CPU, cached under torch's extensions folder.
_WARM = """
from raygym.build_locks import remove_stale_locks
from raygym.extension_folder import use_own_folder
remove_stale_locks(use_own_folder())
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
print(ShareMemCommBuilder().load(verbose=False).__file__)
"""
_OFFLINE = re.compile(
    r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|Failed to establish a new connection"
    r"|Connection refused|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|SSLError"
)


class SetupError(Exception):
    """What is missing and what to do about it, in one line."""


def main() -> int:
    """Set up; 0 when everything is there, 1 with a one-line error, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Set up this checkout's virtual environment and the demo policy.")
    parser.add_argument(
        "--python", default=None, help=f"a Python {LOCKED_FOR} (default: python{LOCKED_FOR}, then python3)"
    )
    chosen = parser.parse_args().python
    key = _key()
    if _is_ready(key):
        return 0
    started = time.monotonic()
    try:
        with LOCK.open() as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)  # a second `make` in the same checkout waits here for the first
            if not _is_ready(key):
                _set_up(chosen, key)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: error: {error}; free space or fix permissions, then run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    print(f"setup: ready in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _key() -> str:
    """Changes whenever the work must be looked at again: other packages, another place, other caches."""
    parts = [LOCK.read_text(), (ROOT / "pyproject.toml").read_text(), str(ROOT), _WARM]
    parts += [os.environ.get(name, "") for name in ("RAYGYM_CACHE", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "HOME")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_ready(key: str) -> bool:
    """The stamp is of this lock, and what it lists is still there. Written last, so it vouches for every step."""
    try:
        stamp = json.loads(STAMP.read_text())
        return stamp["key"] == key and PYTHON.exists() and all(Path(path).exists() for path in stamp["files"])
    except (OSError, ValueError, KeyError):
        return False


def _set_up(chosen: str | None, key: str) -> None:
    python = _find_python(chosen)
    _check_machine(python)
    _make_venv(python)
    packages = [line.strip() for line in LOCK.read_text().splitlines() if "==" in line and not line.startswith("#")]
    torch = next(package for package in packages if package.startswith("torch=="))
    _remove_half_installed()
    _say(2, torch)
    _pip(["--no-deps", torch], 1)
    _say(3, f"{len(packages)} locked packages (a few minutes the first time)")
    _pip(["--no-deps", "-r", str(LOCK)], len(packages))
    _pip(["--no-deps", "--no-build-isolation", "-e", str(ROOT)], 1)
    _say(4, "DeepSpeed's shared-memory op (compiled once, one to two minutes)")
    compiled = _run_in_venv(["-c", _WARM], "DeepSpeed's CPU op does not compile")
    _say(5, f"policy {POLICY} (built once, about a minute)")
    policy = _run_in_venv(["-m", "raygym.models", POLICY], f"the policy {POLICY} cannot be built")
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "files": [compiled, policy]}))
    partial.replace(STAMP)


def _say(step: int, what: str) -> None:
    print(f"setup: [{step}/{STEPS}] {what}", flush=True)


def _probe(python: str) -> dict[str, object] | None:
    try:
        answer = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return dict(json.loads(answer.stdout)) if answer.returncode == 0 else None


def _find_python(chosen: str | None) -> str:
    """An interpreter of the lock's version. A version manager's shim may exist and not run, hence the probe."""
    seen = []
    for candidate in [chosen] if chosen else [f"python{LOCKED_FOR}", "python3", sys.executable]:
        found = _probe(candidate)
        if found and found["version"] == LOCKED_FOR:
            return candidate
        seen.append(f"{candidate} is {found['version'] if found else 'missing or does not run'}")
    raise SetupError(
        f"needs Python {LOCKED_FOR}, which the lock was made for ({', '.join(seen)}); "
        f"install it, or name it: make setup PYTHON=/path/to/python{LOCKED_FOR}"
    )


def _check_machine(python: str) -> None:
    found = _probe(python)
    assert found is not None, python
    if not found["venv"]:
        raise SetupError(f"{python} has no venv module; install it (on Debian: apt install python{LOCKED_FOR}-venv)")
    if not found["headers"]:
        raise SetupError(
            f"Python.h of {python} is missing, and DeepSpeed compiles against it; "
            f"install the headers (on Debian: apt install python{LOCKED_FOR}-dev)"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise SetupError(
            f"no C++ compiler ({compiler}), and DeepSpeed needs one; install g++ (on Debian: apt install g++)"
        )
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if not (VENV / "lib" / f"python{LOCKED_FOR}" / "site-packages" / "vllm").is_dir() and free_gb < NEEDED_GB:
        raise SetupError(f"{free_gb:.1f} GB free at {ROOT}, and the packages need {NEEDED_GB} GB; free some space")


def _make_venv(python: str) -> None:
    """Keep a virtual environment that works; a half-made one, or one of another version, is made anew."""
    works = (
        subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False)
        if PYTHON.exists()
        else None
    )
    found = _probe(str(PYTHON)) if works is not None and works.returncode == 0 else None
    if found and found["version"] == LOCKED_FOR:
        _say(1, "virtual environment .venv is there")
        return
    _say(1, f"virtual environment .venv ({python})")
    made = subprocess.run([python, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise SetupError(f"`{python} -m venv {VENV}` failed: {_last_line(made.stdout + made.stderr)}")


def _remove_half_installed() -> None:
    """pip writes INSTALLER after all files: metadata without it is a package cut off, which pip counts as installed."""
    for packages in (VENV / "lib").glob("python*/site-packages"):
        for metadata in packages.glob("*.dist-info"):
            if not (metadata / "INSTALLER").is_file():
                shutil.rmtree(metadata)
        for leftover in packages.glob("~*"):  # what an interrupted upgrade had moved away
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _pip(arguments: list[str], count: int) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--retries", "3"]
    collected, lines = 0, []
    with LOG.open("w") as log:
        process = subprocess.Popen(
            [*command, "--progress-bar", "off", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line.strip())
            if line.startswith("Collecting "):
                collected += 1
                if collected % 25 == 0:
                    print(f"setup:       fetched {collected} of at most {count}", flush=True)
            elif line.startswith("Installing collected packages"):
                print(f"setup:       installing {line.count(',') + 1} package(s)", flush=True)
    if process.wait() != 0:
        raise SetupError(_pip_failure(lines))


def _pip_failure(lines: list[str]) -> str:
    text = "\n".join(lines)
    missing = re.search(r"No matching distribution found for (\S+)", text)
    if "No space left on device" in text:
        return f"the disk is full; free some space (the packages need {NEEDED_GB} GB), then run it again"
    if _OFFLINE.search(text):
        return (
            f"pip cannot reach the package index; check the network and pip's settings, then run it again (see {LOG})"
        )
    if missing and missing[1].startswith("torch=="):
        return (
            f"pip does not find {missing[1]}; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, then run it again"
        )
    if missing:
        return f"pip does not find {missing[1]}; check which index pip is set to use, then run it again (see {LOG})"
    errors = [line for line in lines if line.lower().startswith("error")]
    return f"pip failed: {errors[0] if errors else _last_line(text)} (see {LOG})"


def _run_in_venv(arguments: list[str], failure: str) -> str:
    """Run the environment's Python; the last line that it prints. Its full output goes to the log."""
    done = subprocess.run(
        [PYTHON, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, env=_environment()
    )
    LOG.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise SetupError(f"{failure}: {_last_line(done.stderr)} (see {LOG})")
    return _last_line(done.stdout)


def _environment() -> dict[str, str]:
    # DeepSpeed looks for ninja on the PATH. The environment's own comes last: versions of ninja hash a command
    # differently, so the op must be compiled with the one that a plain `.venv/bin/raygym` finds, or it compiles again.
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{VENV / 'bin'}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
