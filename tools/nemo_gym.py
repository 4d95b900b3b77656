"""Prepare a Python for NeMo Gym, in raygym's cache directory: `make nemo-gym`. Run by the checkout's own Python.

NeMo Gym asks for another Python than raygym, so its servers live in a virtual environment of their own. It is built
beside its place and renamed when it works: what is there is whole. A second call returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from raygym.nemo_gym.interpreter import VERSION, clean_environment, prepared_folder

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "nemo-gym.txt"
FITTING = ("3.13", "3.12")
NEEDED_GB = 3
STAMP = "raygym-lock"
_OFFLINE = re.compile(r"NewConnectionError|NameResolutionError|Connection refused|timed? ?out|ProxyError|unreachable")


class PrepareError(Exception):
    """What is missing and what to do about it, in one line."""


def main() -> int:
    """0 when it is prepared, 1 with a one-line error, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=f"Prepare a virtual environment with NeMo Gym {VERSION}.")
    parser.add_argument("--python", default="", help=f"a Python {' or '.join(FITTING)} (default: searched for)")
    parser.add_argument("--if-possible", action="store_true", help="where it cannot be: say so and succeed")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        if _is_ready():
            return 0
        prepared_folder().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{prepared_folder()}.lock"):
            if not _is_ready():
                _prepare(_find_python(options.python))
    except PrepareError as error:
        print(f"nemo-gym: {'not prepared' if options.if_possible else 'error'}: {error}", file=sys.stderr)
        return 0 if options.if_possible else 1
    except OSError as error:
        print(f"nemo-gym: error: {error}; free space or fix permissions, then run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nemo-gym: interrupted; run the same command again", file=sys.stderr)
        return 130
    print(f"nemo-gym: ready in {time.monotonic() - started:.0f} s: {prepared_folder()}", flush=True)
    return 0


def _key() -> str:
    return hashlib.sha256(LOCK.read_bytes()).hexdigest()


def _is_ready() -> bool:
    folder = prepared_folder()
    try:
        # The link leads to the Python that it was made from, which may have been removed since.
        return (folder / STAMP).read_text() == _key() and (folder / "bin" / "python").exists()
    except OSError:
        return False


def _find_python(chosen: str) -> str:
    for candidate in [chosen] if chosen else _candidates():
        try:
            command = [candidate, "-c", "import venv, ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
            probe = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if probe.returncode == 0 and probe.stdout.strip() in FITTING:
            return candidate
    raise PrepareError(
        f"{chosen or 'no Python of this machine'} is a Python {' or '.join(FITTING)} with venv, which NeMo Gym needs; "
        "install one, or name it: make nemo-gym NEMO_GYM_PYTHON=/path/to/python"
    )


def _candidates() -> Iterator[str]:
    for version in FITTING:
        yield f"python{version}"
        # A version manager's Pythons are there, but not on the PATH unless chosen.
        pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv") / "versions"
        for folder in (pyenv, Path("~/.local/share/uv/python")):
            yield from map(str, sorted(folder.expanduser().glob(f"*/bin/python{version}"), reverse=True))


def _prepare(python: str) -> None:
    folder = prepared_folder()
    free_gb = shutil.disk_usage(folder.parent).free / 1e9
    if free_gb < NEEDED_GB:
        raise PrepareError(f"{free_gb:.1f} GB free at {folder.parent}, and the packages need {NEEDED_GB} GB")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted call; the lock says that nobody writes it
    print(f"nemo-gym: [1/3] virtual environment ({python})", flush=True)
    _run([python, "-m", "venv", str(partial)])
    count = sum("==" in line for line in LOCK.read_text().splitlines())
    print(f"nemo-gym: [2/3] {count} locked packages (a few minutes)", flush=True)
    _install(partial / "bin" / "python", count)
    print("nemo-gym: [3/3] trying it", flush=True)
    found = _run([str(partial / "bin" / "python"), "-I", "-c",
                  "import importlib.metadata as m, nemo_gym.global_config; print(m.version('nemo-gym'))"])  # fmt: skip
    assert found == VERSION, f"the lock installs NeMo Gym {found}, expected {VERSION}"
    (partial / STAMP).write_text(_key())
    shutil.rmtree(folder, ignore_errors=True)
    # Only `bin/python` is used, which works wherever the folder is; the scripts beside it keep the old path.
    partial.replace(folder)


def _install(python: Path, count: int) -> None:
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command = [str(python), "-m", "pip", "install", *options, "--no-deps", "--ignore-requires-python", "-r", str(LOCK)]
    lines, fetched = [], 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            fetched += line.startswith("Collecting ")
            if line.startswith("Collecting ") and fetched % 25 == 0:
                print(f"nemo-gym:       fetched {fetched} of {count}", flush=True)
            elif line.startswith("Installing collected packages"):
                print("nemo-gym:       installing", flush=True)
    if process.returncode:
        text = "\n".join(lines)
        if "No space left on device" in text:
            raise PrepareError(f"the disk is full; free some space (the packages need {NEEDED_GB} GB) and run it again")
        if _OFFLINE.search(text):
            raise PrepareError("pip cannot reach the package index; check the network and pip's settings, run it again")
        errors = [line for line in lines if line.lower().startswith("error")]
        raise PrepareError(f"pip failed: {(errors or lines or ['no output'])[0]}")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    lines = [line.strip() for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if done.returncode:
        raise PrepareError(f"`{' '.join(command)[:80]}` failed: {last or 'no output'}")
    return last


if __name__ == "__main__":
    sys.exit(main())
