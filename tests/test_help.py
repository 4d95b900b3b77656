"""Every page of the command line's help fits a screen and has an example that works."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from raygym import cli


def _pages(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _pages(inner)


PAGES = {parser.prog: parser for parser in _pages(cli._parser())}


def test_every_command_has_a_page() -> None:
    assert {"raygym", "raygym train", "raygym config check", "raygym report", "raygym doctor"} <= PAGES.keys()


@pytest.mark.parametrize("prog", PAGES)
def test_it_fits_a_screen(prog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = PAGES[prog].format_help().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) < 80
    assert PAGES[prog].description


@pytest.mark.parametrize("prog", PAGES)
def test_its_example_is_a_command_of_its_own(prog: str) -> None:
    kind, _, command = (PAGES[prog].epilog or "").partition(": ")
    assert kind == "example"
    assert command.startswith(prog)
    program, *words = shlex.split(command)
    assert program == "raygym"
    assert cli._options(words).command == words[0]


def test_each_option_says_what_it_is() -> None:
    for parser in PAGES.values():
        assert all(action.help for action in parser._actions if not isinstance(action, argparse._SubParsersAction))
