"""What is set for a whole process, once it has begun."""

from __future__ import annotations

import gc
import sys

import ray

# A thread that wants the interpreter asks for it after this time. Python's own 5 ms are longer than an event loop that
# hands work to threads hundreds of times a second can wait for each.
_SWITCH_INTERVAL_S = 0.0005


def settle_process() -> None:
    """Call it at the end of an actor's constructor. Does nothing outside an actor, such as in a test's process."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    freeze_past()


def freeze_past() -> None:
    """What exists by now stays, so the garbage collector need not look at it again.

    A full collection among the objects of imported packages stops a process for a tenth of a second or more.
    """
    gc.collect()
    gc.freeze()
