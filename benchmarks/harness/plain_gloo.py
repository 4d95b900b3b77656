"""A plain gloo group of several processes on this machine, over TCP on the loopback interface."""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.step_process import StepProcess


class PlainGloo:
    """Its members are processes of their own, as learner rank 0 and the weight stores are."""

    def __init__(self, members: int, version_bytes: int, bucket_bytes: int) -> None:
        """Start them; the first broadcast waits until they are up."""
        self._version_bytes = version_bytes
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="raygym-gloo-"))
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self._members = []
        for rank in range(members):
            numbers = map(str, (rank, members, version_bytes, bucket_bytes))
            arguments = [str(Path(folder) / "meeting"), *numbers]
            process = StepProcess(Path(sys.executable), "harness.gloo_member", arguments, environment)
            self._members.append(self._stack.enter_context(process))
        self._threads = self._stack.enter_context(ThreadPoolExecutor(members))

    def gib_per_s(self) -> float:
        """Broadcast one version, until every member has it.

        Raises:
            StepError: a member ended, or does not answer in time.
        """
        answers = list(self._threads.map(StepProcess.step, self._members))
        assert all(answer["whole"] for answer in answers), "a member did not get the version"
        return self._version_bytes / 2**30 / float(answers[0]["seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
