"""`python -m raygym.owned_command ...`: a command that ends when whoever started it is gone.

Its standard input is a pipe whose other end only the owner holds. When that closes, even by a kill -9 of a notebook's
kernel, the command is interrupted as by Ctrl-C, so that no run goes on that nobody knows of. One that this does not
stop is ended all the same; the guards of its cluster and of its Serve application then see to the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from raygym.cli import main

_AGAIN_S = 60.0
"""A second interrupt skips what a clean stop still waits for: trackers, and the cluster, each for up to a minute."""
_TIMES = 3
_INTERRUPTED = 130


def end_with_owner(again_s: float = _AGAIN_S, times: int = _TIMES) -> None:
    """From now on, this process ends once its standard input is closed.

    Args:
        again_s: seconds from one interrupt to the next, and from the last one to an end without any cleaning up.
        times: so many interrupts.
    """
    # A process that nohup or a script's `&` has started ignores SIGINT, and has its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_owner, args=(again_s, times), daemon=True).start()


def _end_with_owner(again_s: float, times: int) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        continue
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(again_s)
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    end_with_owner()
    sys.exit(main())
