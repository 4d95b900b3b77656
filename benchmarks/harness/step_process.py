"""A learner in a process of its own, step by step, so that two of them can be measured in turns."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BENCHMARKS = Path(__file__).resolve().parent.parent
START_S = 300
"""How long the first step may take: the imports and the model are in it."""
STEP_S = 600


class StepError(Exception):
    """A learner's process ended or is late. The text has the end of what it printed."""


class StepProcess:
    """A module that has a `StepServer`, run by the Python `python`. It begins to load at once."""

    def __init__(self, python: Path, module: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        """`environment` is the process's; what the benchmarks folder has can be imported in it."""
        self._module = module
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        paths = [str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])]
        # -P: the folder that this is started in may hold raygym, which TRL's Python is not to see.
        self._process = subprocess.Popen(
            [str(python), "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            bufsize=0,
        )
        self._steps = 0

    def step(self, command: str = "step") -> dict[str, Any]:
        """Have it make one step, and wait for it; `profile` instead of `step` adds its `operators`, as a table.

        Raises:
            StepError: it ended, or it does not answer in time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        limit_s = STEP_S + (START_S if self._steps == 0 else 0)
        try:
            self._process.stdin.write(f"{command}\n".encode())
        except BrokenPipeError:
            raise self._failed("ended") from None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise self._failed(f"did not answer in {limit_s} s")
        if not (line := self._process.stdout.readline()):
            raise self._failed("ended")
        self._steps += 1
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, how: str) -> StepError:
        self._log.seek(0)
        return StepError(f"{self._module} {how}; its last lines:\n" + "".join(self._log.readlines()[-15:]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
