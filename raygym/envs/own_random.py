"""Packages that draw from Python's one global generator, given a generator of each environment's own.

Such a package seeds and draws from the module `random`. Many environments live in one process, each in a thread, and
Ray draws from it too: between a seed and its draws anything can happen, and one seed would give two tasks. After
`redirect`, the package's own name `random` means whatever `drawing_from` says in the same thread; nobody else notices.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_current: ContextVar[random.Random | None] = ContextVar("raygym_random", default=None)


class _OwnRandom:
    """Stands where a package has the module `random`; outside `drawing_from` it is that module."""

    def __getattr__(self, name: str) -> Any:
        own = _current.get()
        return getattr(own if hasattr(own, name) else random, name)


_own_random = _OwnRandom()


@contextmanager
def drawing_from(generator: random.Random) -> Iterator[None]:
    """Redirected packages draw from `generator`, in this thread, until the end of the block."""
    token = _current.set(generator)
    try:
        yield
    finally:
        _current.reset(token)


def redirect(package: str) -> None:
    """Redirect the modules of `package` that are imported by now. Again after more were imported; twice is harmless."""
    for name, module in list(sys.modules.items()):
        if (name == package or name.startswith(f"{package}.")) and vars(module).get("random") is random:
            vars(module)["random"] = _own_random
