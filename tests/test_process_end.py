"""Waiting for processes to end, on real ones."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from raygym.process_end import wait_ended


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])


def test_it_waits_for_the_last_one_also_where_nobody_collects_it() -> None:
    both = [sleeper(), sleeper()]
    try:
        both[0].kill()
        assert not wait_ended([each.pid for each in both], 0.1)
        timer = threading.Timer(0.2, both[1].kill)
        began = time.monotonic()
        timer.start()
        assert wait_ended([each.pid for each in both], 30)
        assert 0.1 < time.monotonic() - began < 20
        assert [each.returncode for each in both] == [None, None], "they are zombies yet"
    finally:
        for each in both:
            each.kill()
            each.wait()
    assert wait_ended([each.pid for each in both], 0) and wait_ended([], 0)
