"""The lines of a file that another process appends to, each read once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from raygym.run_reading import is_own

_GENERATIONS = itertools.count()


class GrowingLines:
    """A reader that goes on where it was. It sees whole lines only: the last one may be half written."""

    def __init__(self, path: Path, within: Path) -> None:
        """Nothing is read yet, and the file need not be there.

        Args:
            path: of the file.
            within: the folder that it must be in, also where it is a link; another file is not read.
        """
        self.path = path
        self.read_bytes = 0
        """Of the file, so far."""
        self.size = 0
        """Of the file, when it was looked at last."""
        self.generation = next(_GENERATIONS)
        """Another number whenever the file is read from its beginning: of no other file, and of no other time."""
        self.problem = ""
        """Why it could not be read, when that was tried last."""
        self._within = within
        self._identity: tuple[int, int] | None = None
        self._endless_at = -1
        """The size at which no line's end was found behind `read_bytes`."""

    @property
    def looked_at(self) -> int:
        """Bytes that there is nothing more to be had from until the file grows."""
        return self.size if self.size == self._endless_at else self.read_bytes

    def restarted(self) -> bool:
        """Look at the file. Whether it is another one than before, or was cut: it is read from its beginning then."""
        try:
            found = self.path.stat()
            identity = (found.st_dev, found.st_ino)
            if identity != self._identity and not is_own(self.path, self._within):
                raise FileNotFoundError
        except OSError:
            self.size = 0
            return self._forget(None)
        self.size = found.st_size
        if self._identity not in (None, identity) or self.size < self.read_bytes:
            self._forget(identity)
            return True
        self._identity = identity
        return False

    def new(self) -> Iterator[tuple[int, bytes]]:
        """Lines that were added, each with the position of its first byte. Call `restarted` before."""
        if self.size <= self.looked_at:
            return
        try:
            with self._opened() as file:
                file.seek(self.read_bytes)
                for line in file:
                    if not line.endswith(b"\n"):
                        self._endless_at = self.read_bytes + len(line)
                        break
                    start = self.read_bytes
                    self.read_bytes += len(line)
                    yield start, line
            self.problem = ""
        except OSError as error:
            self.problem = f"{self.path.name} cannot be read ({error.strerror or error})"

    def part(self, start: int, length: int) -> bytes:
        """Bytes of the file that `restarted` saw last.

        Raises:
            OSError: it cannot be read, or is another file by now.
            LookupError: it has not so many any more.
        """
        with self._opened() as file:
            file.seek(start)
            found = file.read(length)
        if len(found) < length:
            raise LookupError(f"{self.path.name} was cut meanwhile")
        return found

    def _opened(self) -> BinaryIO:
        file = self.path.open("rb")
        found = os.fstat(file.fileno())
        if (found.st_dev, found.st_ino) != self._identity:
            file.close()
            raise FileNotFoundError(f"{self.path.name} was replaced meanwhile")
        return file

    def _forget(self, identity: tuple[int, int] | None) -> bool:
        had_something = self.read_bytes > 0
        self._identity = identity
        self.read_bytes = 0
        self._endless_at = -1
        self.generation = next(_GENERATIONS)
        return had_something
