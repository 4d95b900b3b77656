"""`python -m raygym.owned_command ...`: a command that ends when whoever started it is gone.

Its standard input is a pipe whose other end only the owner holds. When that closes, even by a kill -9 of a notebook's
kernel, the command is interrupted as by Ctrl-C, so that no run goes on that nobody knows of.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from raygym.cli import main


def _end_with_owner() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        continue
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=_end_with_owner, daemon=True).start()
    sys.exit(main())
