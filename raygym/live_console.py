"""What all of raygym's console output shares: plain lines, and phases with a live line in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status
from rich.text import Text


class LiveConsole:
    """A console with one live line, where it is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """Nothing is printed yet. `console` is for tests."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._started = time.monotonic()

    def line(self, text: str) -> None:
        """One plain line."""
        self._console.print(text, markup=False)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Show what is being done or waited for. Where the output is no terminal, it is one line."""
        if not self._console.is_terminal:
            self.line(text)
        with self.live(text):
            yield

    @contextmanager
    def live(self, text: str) -> Iterator[None]:
        """Show the live line, where the output is a terminal; elsewhere nothing."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(self._live(text)) as status:
            self._status = status
            try:
                yield
            finally:
                self._status = None

    def start_clock(self) -> None:
        """What is measured begins now."""
        self._started = time.monotonic()

    def _live(self, text: str) -> Text:
        """How the live line shows a text."""
        return Text(text)


def duration(seconds: float) -> str:
    """Seconds as people write them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
