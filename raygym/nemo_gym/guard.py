"""Runs one server and never outlives whoever started it: `python -I -S guard.py COMMAND...`, standard input a pipe.

When the pipe's other end closes, even by a kill -9, the server gets SIGINT, on which NeMo Gym's servers end cleanly,
and soon after SIGKILL with everything that it has started. It needs the standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 5.0
_POLL_S = 0.2


def main(command: list[str]) -> None:
    """Run `command` in this process's group, which is this process's own, and end the group with it."""
    # A handler, not "ignore": the server would inherit that and could not be interrupted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            os.killpg(0, signal.SIGINT)
            deadline = time.monotonic() + GRACE_S
            while server.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_S / 4)
            break
    print(f"raygym: the server's exit status is {server.poll()}", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
