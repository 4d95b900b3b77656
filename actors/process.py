"""What is set for a whole process, once it has begun."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import ray

from raygym.engine_files import use_folder_of

# A thread that wants the interpreter asks for it after this time. Python's own 5 ms are longer than an event loop that
# hands work to threads hundreds of times a second can wait for each.
_SWITCH_INTERVAL_S = 0.0005


def settle_process() -> None:
    """Call it at the end of an actor's constructor. Does nothing outside an actor, such as in a test's process."""
    if not _is_actor():
        return
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    freeze_past()


def freeze_past() -> None:
    """What exists by now stays, so the garbage collector need not look at it again.

    A full collection among the objects of imported packages stops a process for a tenth of a second or more.
    """
    gc.collect()
    gc.freeze()


def keep_files_in_session() -> None:
    """Temporary files of an engine go with Ray's session directory; see `engine_files`. Nothing outside an actor."""
    if not _is_actor():
        return
    node: Any = ray._private.worker._global_node
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # with PyTorch, which the engine needs anyway

    use_folder_of(Path(node.get_session_dir_path()), default_cache_dir())


def _is_actor() -> bool:
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
