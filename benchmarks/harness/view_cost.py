"""What drawing the console's view costs: in a terminal, which is drawn several times a second."""

from __future__ import annotations

import os
import pty
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live

from raygym.console import RunConsole
from raygym.live_console import REDRAWN_PER_S
from raygym.run_row import parsed_row, scalars

_COLUMNS, _LINES = 120, 40


def view_share(rows: Sequence[Mapping[str, Any]], draws: int = 200) -> float:
    """Processor time of the view, as a share of one core, with a run's rows in it; on a real pseudo-terminal.

    Args:
        rows: of metrics.jsonl.
        draws: that are measured.
    """
    reader, writer = pty.openpty()
    drain = threading.Thread(target=_drain, args=(reader,), daemon=True)
    drain.start()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        output = Console(file=terminal, force_terminal=True, width=_COLUMNS, height=_LINES, highlight=False)
        console = RunConsole(len(rows), output)
        with console.doing("step"), Live(console=output, get_renderable=console.view, auto_refresh=False) as live:
            for row in rows:
                console.step(row["step"], scalars(parsed_row({key: row[key] for key in row if key != "step"})))
            live.refresh()  # the first one imports
            seconds = []
            for _ in range(draws):
                console.progress("collecting: 12 of 48 episodes")
                started = time.thread_time()
                live.refresh()
                seconds.append(time.thread_time() - started)
    drain.join(timeout=10)
    return fmean(seconds) * REDRAWN_PER_S


def _drain(reader: int) -> None:
    """Read until the other end is closed, which Linux tells by an error."""
    with suppress(OSError):
        while os.read(reader, 2**16):
            continue
    os.close(reader)
