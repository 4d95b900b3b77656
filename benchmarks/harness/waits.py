"""How long everything took that somebody waited for, written down as it ends, by processes that may be killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raygym.types import EpisodeFailure


@dataclass(frozen=True, slots=True)
class Wait:
    """One that ended, well or not. A process that was killed leaves those that it still waited for unwritten."""

    what: str
    """`turn` or `attempt`."""
    seconds: float
    outcome: str
    """Empty where it went well, else the kind of failure; `cancelled` too when its caller gave up."""
    group_id: str = ""
    episode: int = -1
    attempt: int = -1


class WaitLog:
    """A file that any number of processes append lines to."""

    def __init__(self, path: str) -> None:
        """Created with the first line."""
        self._path = path

    @contextmanager
    def wait(self, what: str, **identity: Any) -> Iterator[list[str]]:
        """Time the block; its outcome is what it puts into the list, or the failure that it raises."""
        outcome = [""]
        started = time.monotonic()
        try:
            yield outcome
        except EpisodeFailure as failure:
            outcome[0] = str(failure.kind)
            raise
        except BaseException as error:
            outcome[0] = "cancelled" if type(error).__name__ == "CancelledError" else type(error).__name__
            raise
        finally:
            wait = Wait(what, time.monotonic() - started, outcome[0], **identity)
            # One write of a short line: those of other processes come before or after it.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, f"{json.dumps(asdict(wait))}\n".encode())
            finally:
                os.close(file)

    def read(self) -> list[Wait]:
        """All that was written."""
        path = Path(self._path)
        return [Wait(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def longest_s(waits: Sequence[Wait], what: str) -> float:
    """The longest wait of a kind."""
    return max((wait.seconds for wait in waits if wait.what == what), default=0.0)
