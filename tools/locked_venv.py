"""A virtual environment of its own for what cannot live in raygym's: made from a complete lock, whole or not at all.

It is built beside its place and renamed when it works: what is there is whole. A second call returns at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from raygym.nemo_gym.interpreter import clean_environment

STAMP = "raygym-lock"
_OFFLINE = re.compile(r"NewConnectionError|NameResolutionError|Connection refused|timed? ?out|ProxyError|unreachable")


class PrepareError(Exception):
    """What is missing and what to do about it, in one line."""


@dataclass(frozen=True)
class LockedVenv:
    """What to install where, and how to see that it works."""

    name: str
    """Of the make target; each line that is printed begins with it."""
    package: str
    """As people write it."""
    version: str
    folder: Path
    lock: Path
    probe: str
    """Python code that imports the package and prints its version."""
    pythons: tuple[str, ...]
    """Versions that fit, the best first."""
    needed_gb: float
    variable: str
    """The make variable that names a Python."""
    pip_options: tuple[str, ...] = ()

    def make(self, python: str, *, if_possible: bool = False) -> int:
        """Prepare it with `python`, or where that is empty with one that is found.

        Returns:
            The exit status: 0 when it is prepared, 1 with a one-line error, 130 when interrupted. With `if_possible`
            0 too where it cannot be prepared, which is said.
        """
        started = time.monotonic()
        try:
            if self._is_ready():
                return 0
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.folder}.lock"):
                if not self._is_ready():
                    self._prepare(self._find_python(python))
        except PrepareError as error:
            print(f"{self.name}: {'not prepared' if if_possible else 'error'}: {error}", file=sys.stderr)
            return 0 if if_possible else 1
        except OSError as error:
            print(f"{self.name}: error: {error}; free space or fix permissions, then run it again", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted; run the same command again", file=sys.stderr)
            return 130
        print(f"{self.name}: ready in {time.monotonic() - started:.0f} s: {self.folder}", flush=True)
        return 0

    def _key(self) -> str:
        return hashlib.sha256(self.lock.read_bytes()).hexdigest()

    def _is_ready(self) -> bool:
        try:
            # The link leads to the Python that it was made from, which may have been removed since.
            return (self.folder / STAMP).read_text() == self._key() and (self.folder / "bin" / "python").exists()
        except OSError:
            return False

    def _find_python(self, chosen: str) -> str:
        for candidate in [chosen] if chosen else self._candidates():
            try:
                command = [candidate, "-c", "import venv, ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
                probe = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError:
                continue
            if probe.returncode == 0 and probe.stdout.strip() in self.pythons:
                return candidate
        raise PrepareError(
            f"{chosen or 'no Python of this machine'} is a Python {' or '.join(self.pythons)} with venv, which "
            f"{self.package} needs; install one, or name it: make {self.name} {self.variable}=/path/to/python"
            f"{self.pythons[0]}"
        )

    def _candidates(self) -> Iterator[str]:
        yield sys.executable
        for version in self.pythons:
            yield f"python{version}"
            # A version manager's Pythons are there, but not on the PATH unless chosen.
            pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv") / "versions"
            for folder in (pyenv, Path("~/.local/share/uv/python")):
                yield from map(str, sorted(folder.expanduser().glob(f"*/bin/python{version}"), reverse=True))

    def _prepare(self, python: str) -> None:
        free_gb = shutil.disk_usage(self.folder.parent).free / 1e9
        if free_gb < self.needed_gb:
            raise PrepareError(
                f"{free_gb:.1f} GB free at {self.folder.parent}, and the packages need {self.needed_gb} GB"
            )
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted call; the lock says that nobody writes it
        print(f"{self.name}: [1/3] virtual environment ({python})", flush=True)
        _run([python, "-m", "venv", str(partial)])
        count = sum("==" in line for line in self.lock.read_text().splitlines() if not line.startswith("#"))
        print(f"{self.name}: [2/3] {count} locked packages (a few minutes)", flush=True)
        self._install(partial / "bin" / "python", count)
        print(f"{self.name}: [3/3] trying it", flush=True)
        found = _run([str(partial / "bin" / "python"), "-I", "-c", self.probe])
        assert found == self.version, f"the lock installs {self.package} {found}, expected {self.version}"
        (partial / STAMP).write_text(self._key())
        shutil.rmtree(self.folder, ignore_errors=True)
        # Only `bin/python` is used, which works wherever the folder is; the scripts beside it keep the old path.
        partial.replace(self.folder)

    def _install(self, python: Path, count: int) -> None:
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--no-deps", *self.pip_options]
        command = [str(python), "-m", "pip", "install", *options, "-r", str(self.lock)]
        lines, fetched = [], 0
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment()
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.strip())
                fetched += line.startswith("Collecting ")
                if line.startswith("Collecting ") and fetched % 25 == 0:
                    print(f"{self.name}:       fetched {fetched} of {count}", flush=True)
                elif line.startswith("Installing collected packages"):
                    print(f"{self.name}:       installing", flush=True)
        if process.returncode:
            raise PrepareError(self._pip_failure(lines))

    def _pip_failure(self, lines: list[str]) -> str:
        text = "\n".join(lines)
        if "No space left on device" in text:
            return f"the disk is full; free some space (the packages need {self.needed_gb} GB) and run it again"
        if _OFFLINE.search(text):
            return "pip cannot reach the package index; check the network and pip's settings, run it again"
        if torch := re.search(r"No matching distribution found for (torch==\S+)", text):
            return f"pip does not find {torch[1]}; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, run it again"
        errors = [line for line in lines if line.lower().startswith("error")]
        return f"pip failed: {(errors or lines or ['no output'])[0]}"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    lines = [line.strip() for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if done.returncode:
        raise PrepareError(f"`{' '.join(command)[:80]}` failed: {last or 'no output'}")
    return last
