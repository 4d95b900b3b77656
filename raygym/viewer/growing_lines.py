"""The lines of a file that another process appends to, each read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


class GrowingLines:
    """A reader that goes on where it was. It sees whole lines only: the last one may be half written."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet, and the file need not be there."""
        self.path = path
        self.read_bytes = 0
        """Of the file, so far."""
        self.size = 0
        """Of the file, when it was looked at last."""
        self._identity: tuple[int, int] | None = None

    def restarted(self) -> bool:
        """Look at the file. Whether it is another one than before, or was cut: it is read from its beginning then."""
        try:
            found = self.path.stat()
        except OSError:
            self.size = 0
            return self._forget()
        self.size = found.st_size
        identity = (found.st_dev, found.st_ino)
        if self._identity not in (None, identity) or self.size < self.read_bytes:
            self._forget()
            self._identity = identity
            return True
        self._identity = identity
        return False

    def new(self) -> Iterator[tuple[int, bytes]]:
        """Lines that were added, each with the position of its first byte. Call `restarted` before."""
        if self.size <= self.read_bytes:
            return
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self.read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start = self.read_bytes
                self.read_bytes += len(line)
                yield start, line

    def _forget(self) -> bool:
        had_something = self.read_bytes > 0
        self._identity = None
        self.read_bytes = 0
        return had_something
