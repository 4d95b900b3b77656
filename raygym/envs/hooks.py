"""Functions named as `module:function` in an environment's kwargs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load_function(key: str, path: str) -> Callable[..., Any]:
    """The function that `path` names as `module:function` (the current directory counts).

    Args:
        key: the keyword argument that names it, for the error.
        path: such as `my_lake:describe`.

    Raises:
        ValueError: there is no such module or function.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not module or not name:
        raise ValueError(f"{key}: {path!r}; expected module:function, such as my_env:{key}")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{key}: {path!r}: module {module!r} cannot be imported ({error})") from error
    if not callable(function):
        raise ValueError(f"{key}: {path!r}: module {module!r} has no function {name!r}")
    return function  # type: ignore[no-any-return]
