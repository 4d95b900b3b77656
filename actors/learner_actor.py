"""The Ray actor of one learner's rank: a shell, so that the driver, which names its class, need not import PyTorch."""

from __future__ import annotations

from typing import Any


class LearnerActor:
    """A rank of the gang: what `Learner` does, by its methods' names."""

    def __init__(self, *args: Any) -> None:
        """The arguments are those of `Learner`."""
        # It takes seconds, and this process is not the one that everybody waits for.
        from raygym.actors.learner import Learner

        self._learner = Learner(*args)

    def call(self, method: str, *args: Any) -> Any:
        """What the method of `Learner` returns or raises."""
        return getattr(self._learner, method)(*args)


def ask(actor: Any, method: str, *args: Any) -> Any:
    """Have a `LearnerActor` do it, under the method's own name in Ray's lists of tasks. Returns Ray's reference."""
    return actor.call.options(name=f"{LearnerActor.__name__}.{method}").remote(method, *args)
