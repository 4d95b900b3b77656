"""What became of a version that learner 0 sent, without PyTorch: the driver is told of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from raygym.weight_delta import DeltaSummary, EncodedBucket, summarize


@dataclass(slots=True)
class SentVersion:
    """What learner 0 sent."""

    checksums: dict[str, int] = field(default_factory=dict)
    """Of each tensor."""
    updates: int = 0
    """That the weights have seen."""
    delta: list[EncodedBucket] = field(default_factory=list)
    """By bucket, of a version that goes as what changed; without the data."""
    sent_nbytes: int = 0
    """Of them, to each other node."""
    seconds: dict[str, float] = field(default_factory=dict)
    """In `gather`, `write`, `encode` and `broadcast`; the last runs beside the others."""

    def summary(self) -> DeltaSummary | None:
        """Of a version that went as what changed."""
        return replace(summarize(self.delta), nbytes=self.sent_nbytes) if self.delta else None

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        started = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
