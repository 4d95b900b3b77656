"""A viewer on a free port, and Chromium to look at it with."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from raygym.viewer.app import viewer_app
from raygym.viewer.command import listening_socket
from raygym.viewer.run_folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The machine's own: Playwright's download is not needed."""
ARGUMENTS = ["--no-sandbox"]  # CI runs as root


@contextmanager
def viewing(path: Path, *, read: bool = True) -> Iterator[str]:
    """Serve a run; gives the address.

    Args:
        path: of the run.
        read: all that is there is read before. Otherwise a page may be opened sooner, is shown without it, and changes
            at some later moment.
    """
    folder = RunFolder(path)
    if read:
        folder.refresh()
    server = uvicorn.Server(uvicorn.Config(viewer_app(folder), log_level="error", timeout_graceful_shutdown=1))
    with listening_socket(0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the viewer does not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(10)
