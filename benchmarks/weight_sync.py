"""Weight updates beside what the machine can do: a copy in memory, and a plain gloo broadcast over TCP.

All in one run and in turns: copying 512 MiB, then a version of SmolLM2's size from one process to one and to two
others by `torch.distributed` alone, bucket by bucket as raygym does it, then a `publish` of raygym's own. Ratios are of
samples that followed each other. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np
from harness import report
from harness.plain_gloo import PlainGloo

from raygym.config import SyncConfig
from raygym.weights import Published

SMOLLM2_BYTES = 134_515_008 * 4
COPIED_BYTES = 512 << 20
RECEIVERS = (1, 2)


@dataclass(frozen=True)
class Ceiling:
    """What the machine did just before, in GiB/s."""

    memcpy: float
    gloo: Mapping[int, float]
    """By number of receivers: a broadcast to all of them, in bytes of one version."""


Measurement = Callable[[Ceiling], dict[str, float]]
"""One sample of each of its metrics, taken right after the ceiling."""
MEASUREMENTS: tuple[Callable[[], AbstractContextManager[Measurement]], ...] = ()
"""Of raygym's own update, one for each layout: it starts actors, yields the measurement (a `publish`, then
`of_published`), and ends them. None is here before the weight stores are: the run then reports the ceiling alone."""


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repetitions, 64 MiB instead of SmolLM2's 513")
    parser.add_argument("--repetitions", type=int, default=0, help="default: 5, quick: 2")
    options = parser.parse_args()
    repetitions = options.repetitions or (2 if options.quick else 5)
    version_bytes = 64 << 20 if options.quick else SMOLLM2_BYTES
    bucket_bytes = min(SyncConfig().bucket_mib << 20, version_bytes // 4)
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        plain = {n: stack.enter_context(PlainGloo(1 + n, version_bytes, bucket_bytes)) for n in RECEIVERS}
        copy = Copy(COPIED_BYTES)
        own = [stack.enter_context(measurement()) for measurement in MEASUREMENTS]
        for group in plain.values():
            group.gib_per_s()  # connects, and touches the memory
        for _ in range(repetitions):
            ceiling = Ceiling(copy.gib_per_s(), {n: group.gib_per_s() for n, group in plain.items()})
            values = {"memcpy_gib_per_s": ceiling.memcpy}
            values |= {f"gloo_gib_per_s_{n}_receivers": speed for n, speed in ceiling.gloo.items()}
            for measure in own:
                values |= measure(ceiling)
            for name, value in values.items():
                samples.setdefault(name, []).append(value)
    report(
        "weight_sync",
        samples,
        config=f"a version of {version_bytes / 2**20:.0f} MiB in buckets of {bucket_bytes / 2**20:.0f} MiB",
    )


def of_published(published: Published, replicas: int, receivers: int, ceiling: Ceiling) -> dict[str, float]:
    """Samples of one `publish`, named for the number of replicas; its split of time goes to standard output.

    Args:
        published: what it returned. Its `split` has seconds of gather, write, broadcast, verify and apply.
        replicas: that serve it.
        receivers: stores on other nodes, to which it went over TCP; 0: all through shared memory.
        ceiling: measured just before.
    """
    gib, split = published.nbytes / 2**30, published.split
    print(f"{replicas} replicas, {receivers} receivers:", ", ".join(f"{k} {v:.3f} s" for k, v in split.items()))
    values = {
        f"publish_and_apply_s_{replicas}_replicas": published.broadcast_s + published.apply_s,
        f"control_calls_{replicas}_replicas": float(published.control_calls),
        f"shm_over_memcpy_{replicas}_replicas": gib / split["write"] / ceiling.memcpy,
    }
    if receivers:
        values[f"tcp_over_gloo_{receivers}_receivers"] = gib / split["broadcast"] / ceiling.gloo[receivers]
    return values


class Copy:
    """Copies in memory, between arrays that are there already."""

    def __init__(self, nbytes: int) -> None:
        self._source = np.ones(nbytes, np.uint8)
        self._target = self._source.copy()

    def gib_per_s(self) -> float:
        """One copy, by one thread."""
        started = time.perf_counter()
        np.copyto(self._target, self._source)
        return self._source.nbytes / 2**30 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
