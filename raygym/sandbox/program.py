"""Runs a program inside the jail, then calls its functions. What is expected of them is known outside only."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from raygym.sandbox import jail

NAME = "<program>"
_OWN = (__file__, jail.__file__)


def run(source: str, name: str, calls: Sequence[tuple[str, Sequence[Any]]], results: int) -> int:
    """Execute `source`, then make the calls in order, each with its result as one line of JSON.

    Args:
        source: the program.
        name: its `__name__`.
        calls: function names, each with its arguments.
        results: descriptor that takes the lines: `{"value": ...}`, or `{"error": "<type>: <text>"}`.

    Returns:
        The exit status, as Python itself would end: 1 after an uncaught exception, or what `sys.exit` asked for.
    """
    # `dataclasses`, `pickle` and the like look the module up.
    module = type(sys)(name)
    sys.modules[name] = module
    try:
        exec(_compiled(source), vars(module))
    except SystemExit as error:
        return _status(error)
    except BaseException as error:
        _print(error)
        return 1
    for function, arguments in calls:
        line = json.dumps(_outcome(vars(module), function, arguments)).encode() + b"\n"
        while line:
            line = line[os.write(results, line) :]
    return 0


def _compiled(source: str) -> CodeType:
    return compile(source, NAME, "exec", dont_inherit=True)


def _outcome(namespace: Mapping[str, Any], function: str, arguments: Sequence[Any]) -> dict[str, Any]:
    try:
        if function not in namespace:
            return {"error": f"NameError: the program defines no {function}"}
        value = namespace[function](*arguments)
        json.dumps(value)
    except BaseException as error:
        return {"error": _in_words(error)}
    return {"value": value}


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:  # an exception of the program's own, whose text raises in turn
        return type(error).__name__


def _status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _print(error: BaseException) -> None:
    """The traceback, without the frames of what stands around the program."""
    described = traceback.TracebackException.from_exception(error)
    described.stack = traceback.StackSummary.from_list(
        [frame for frame in described.stack if frame.filename not in _OWN]
    )
    print("".join(described.format()), end="", file=sys.stderr)
