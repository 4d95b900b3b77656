"""What all of raygym's console output shares: lines, and under them in a terminal a view of what is going on."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import IO, Any, cast

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.text import Text

REDRAWN_PER_S = 4
_ASCII_BARS = {"█": "#", "▓": "=", "▒": "-", "░": ".", "━": "#", "─": "-", "●": "*", "…": "~", "Δ": "d", "→": ">"}


class Verbosity(IntEnum):
    """How much a command tells."""

    QUIET = -1
    """What went wrong, and the result."""
    NORMAL = 0
    VERBOSE = 1
    """Also what it and its libraries log."""


class _Output:
    """A file for rich to write to that never raises: no run ends because what it says cannot be written or read.

    What a full disk has no room for stays in the file's own buffer, and is written later. When nobody reads a pipe any
    more, its descriptor becomes /dev/null, so that Python's own flush at the end finds nothing wrong either. rich would
    do that to descriptor 1, which may be the driver's log by then, and end the thread that printed.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file

    @property
    def _now(self) -> IO[str] | None:
        """Without a file, the standard output; None where that was closed before Python began."""
        return self._file or sys.stdout

    def write(self, text: str) -> int:
        with self._unfailing():
            if self._now is not None:
                self._now.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unfailing():
            if self._now is not None:
                self._now.flush()

    def isatty(self) -> bool:
        found = False
        with self._unfailing():
            found = self._now is not None and self._now.isatty()
        return found

    @contextmanager
    def _unfailing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno(), inheritable=self.fileno() <= 2)
        except (OSError, ValueError):
            pass  # ValueError: it is closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now, name)  # encoding, fileno


class Terminal(Console):
    """rich's console, whose width is that of its own output. rich asks descriptors 0 to 2, which may be a log's."""

    def __init__(self) -> None:
        output = _Output()
        # FORCE_COLOR asks for colours in a file; a view that is drawn anew has no place there.
        no_view = None if output.isatty() else False
        super().__init__(file=cast("IO[str]", output), highlight=False, soft_wrap=True, force_interactive=no_view)

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines."""
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError, AttributeError):
            return super().size
        # A terminal that does not know its size says 0, as under some job runners.
        return ConsoleDimensions(columns, lines) if columns and lines else super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


class LiveConsole:
    """Lines that stay, and, where the output is a terminal, a view below them that is drawn anew as things change."""

    def __init__(
        self,
        console: Console | None = None,
        verbosity: Verbosity = Verbosity.NORMAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is printed yet.

        Args:
            console: for tests.
            verbosity: how much is told.
            clock: seconds.
        """
        self._console = console or Terminal()
        self._verbosity = verbosity
        self._clock = clock
        self._started = clock()
        # What is being done, the innermost last, each with when it began.
        self._doing: list[tuple[str, float]] = []
        self._progress = ""
        self._doing_lock = threading.Lock()
        self._shown: Live | None = None

    @property
    def verbosity(self) -> Verbosity:
        """How much is told."""
        return self._verbosity

    def write_to(self, file: IO[str] | None) -> None:
        """Print there from now on; None: to standard output, whatever that is."""
        self._console.file = cast("IO[str]", _Output(file))

    def line(self, text: str) -> None:
        """One line that everybody has to see: what went wrong, what was changed or moved, the result."""
        self._print(Text(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """One line on how things go; not for who wants quiet."""
        if self._verbosity > Verbosity.QUIET:
            self.line(text)

    def detail(self, text: str) -> None:
        """One line for who wants to know more; from any thread."""
        if self._verbosity >= Verbosity.VERBOSE:
            self._print(Text(text, style="dim"), soft_wrap=True)

    def _print(self, text: Text, **layout: Any) -> None:
        """All lines that stay go through here. `layout`: of rich's `Console.print`."""
        text.plain = self._encodable(text.plain)
        self._console.print(text, **layout)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Show what is being done or waited for. Where the output is no terminal, it is one line."""
        if not self._console.is_interactive:
            self.note(text)
        with self.live(text):
            yield

    @contextmanager
    def live(self, text: str) -> Iterator[None]:
        """Show in the view what is being done; nothing where the output is no terminal. The outermost one ends it."""
        with self.doing(text):
            if self._shown is not None or not self._shows_view:
                yield
                return
            # Not under the lock of `doing`: drawing holds rich's own and takes that one.
            self._shown = Live(
                console=self._console,
                get_renderable=self.view,
                refresh_per_second=REDRAWN_PER_S,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            try:
                with self._shown:
                    yield
            finally:
                self._shown = None

    @contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """What the view says is being done; `live` shows that view, too."""
        with self._doing_lock:
            self._doing.append((text, self._clock()))
            self._progress = ""
        try:
            yield
        finally:
            with self._doing_lock:
                self._doing.pop()
                self._progress = ""

    def start_clock(self) -> None:
        """What is measured begins now."""
        self._started = self._clock()

    @property
    def _shows_view(self) -> bool:
        return self._console.is_interactive and self._verbosity > Verbosity.QUIET

    def view(self) -> RenderableType:
        """The whole view, drawn several times a second. As many lines as the terminal has room for."""
        width, height = self._console.size
        # Beside the last line that was printed, so that the view never scrolls what it cannot take back.
        lines = self._lines(width)[: max(1, height - 2)]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*(self._fitting(line, width) for line in lines))

    def _lines(self, width: int) -> list[Text]:
        """The view's lines, the most important first; what is wider than `width` is cut."""
        return [self._headline()]

    def _headline(self) -> Text:
        """What is being done, and for how long."""
        with self._doing_lock:
            text, since = self._doing[-1] if self._doing else ("", self._clock())
            progress = self._progress
        seconds = self._clock() - since
        # It blinks slowly: a sign of life that can be overlooked.
        head = Text().append("● ", style="green dim" if int(seconds) % 2 else "green")
        head.append(text, style="bold")
        if progress:
            head.append(f"  {progress}")
        return head.append(f"  {duration(seconds)}", style="dim")

    def _fitting(self, line: Text, width: int) -> Text:
        plain = self._encodable(line.plain)
        if plain != line.plain:
            line = Text(plain, spans=line.spans, style=line.style, no_wrap=True)
        line.truncate(max(1, width - 1), overflow="ellipsis" if self._utf8 else "crop")
        return line

    @property
    def _utf8(self) -> bool:
        return self._console.encoding.lower().startswith("utf")

    def _encodable(self, text: str) -> str:
        """The text in characters that the output has, one for one."""
        if self._utf8:
            return text
        encoding = self._console.encoding
        text = "".join(_ASCII_BARS.get(character, character) for character in text)
        return text.encode(encoding, errors="replace").decode(encoding)


def duration(seconds: float) -> str:
    """Seconds as people write them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
