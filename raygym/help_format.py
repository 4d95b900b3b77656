"""How the command line prints its help: each page fits a terminal of 80 columns and 24 lines."""

from __future__ import annotations

import argparse
from typing import Any

_WIDTH = 80
_NAMES = 26
"""Columns that an option and its value may take before its text."""
_SAID_BY_USAGE = ("positional arguments", "options")


class CompactHelp(argparse.HelpFormatter):
    """One line an option, and no headings for what the usage line tells apart already."""

    def __init__(self, prog: str, **options: Any) -> None:
        """As argparse calls it; newer versions of Python give more options."""
        super().__init__(prog, **{"max_help_position": _NAMES, **options})
        self._width = min(self._width, _WIDTH)

    def start_section(self, heading: str | None) -> None:
        """Begin a group of arguments."""
        super().start_section(argparse.SUPPRESS if heading in _SAID_BY_USAGE else heading)


class Command(argparse.ArgumentParser):
    """A command, or a command of a command."""

    def __init__(self, **options: Any) -> None:
        """As argparse's own, with the compact help."""
        super().__init__(**{"formatter_class": CompactHelp, **options})
