"""Weight updates beside what the machine can do: a copy in memory, and a plain gloo broadcast over TCP.

All in one run and in turns: copying 512 MiB, then a version of SmolLM2 from one process to one and to two others by
`torch.distributed` alone, bucket by bucket as raygym does it, then raygym's own: learner 0 (DeepSpeed) to stores as
other nodes have them, over TCP; and whole updates of one and of two vLLM replicas on this node. Ratios are of samples
that followed each other. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from harness import calibrate, report
from harness.plain_gloo import PlainGloo
from harness.weight_layouts import Engines, Stores, learners
from harness.worst import worst

from raygym.actors import cluster
from raygym.actors.learner_group import LearnerGroup
from raygym.config import SyncConfig
from raygym.models import resolve_policy
from raygym.weight_slots import WeightSlots
from raygym.weights import Published

MODEL = "smollm2-135m-instruct"
COPIED_BYTES = 512 << 20
COUNTS = (1, 2)
"""Receivers over TCP, and replicas on this node."""
_SETTLED_AFTER_S = 0.5


@dataclass(frozen=True)
class Ceiling:
    """What the machine did just before, in GiB/s."""

    memcpy: float
    gloo: Mapping[int, float]
    """By number of receivers: a broadcast to all of them, in bytes of one version."""


Measure = Callable[[Ceiling], dict[str, float]]
"""One sample of each of its metrics, taken right after the ceiling."""


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repetitions, and simulated engines instead of vLLM")
    parser.add_argument("--repetitions", type=int, default=0, help="default: 5, quick: 2")
    options = parser.parse_args()
    calibrate()
    repetitions = options.repetitions or (2 if options.quick else 5)
    engine = "simulated" if options.quick else "vllm"
    bucket_bytes = SyncConfig().bucket_mib << 20
    model_dir = str(resolve_policy(MODEL))
    samples: dict[str, list[float]] = {}
    cluster.connect()
    try:
        with learners(model_dir) as gang:
            version_bytes = gang.call_first("weight_manifest", bucket_bytes, timeout_s=60).nbytes
            with ExitStack() as stack:
                plain = {n: stack.enter_context(PlainGloo(1 + n, version_bytes, bucket_bytes)) for n in COUNTS}
                copy = Copy(COPIED_BYTES)
                for group in plain.values():
                    group.gib_per_s()  # connects, and touches the memory
                layouts: list[Callable[[], AbstractContextManager[Measure]]] = [
                    *(partial(over_tcp, gang, count, bucket_bytes) for count in COUNTS),
                    *(partial(on_this_node, gang, model_dir, engine, count) for count in COUNTS),
                ]
                for layout in layouts:
                    with layout() as measure:
                        for _ in range(repetitions):
                            ceiling = Ceiling(copy.gib_per_s(), {n: group.gib_per_s() for n, group in plain.items()})
                            # Plain gloo's processes are busy for a tenth of a second beyond the broadcast, and have a
                            # higher priority than Ray's: a version took twice as long beside them.
                            time.sleep(_SETTLED_AFTER_S)
                            values = {"memcpy_gib_per_s": ceiling.memcpy}
                            values |= {f"gloo_gib_per_s_{n}": speed for n, speed in ceiling.gloo.items()}
                            for name, value in (values | measure(ceiling)).items():
                                samples.setdefault(name, []).append(value)
    finally:
        cluster.disconnect()
    for name in ("tcp_over_gloo", "shm_over_memcpy"):  # the worse of the layouts
        samples[name] = worst(samples, [f"{name}_{count}" for count in COUNTS])
    for name in ("control_calls", "publish_and_apply_s"):
        samples[name] = samples[f"{name}_{COUNTS[-1]}"]
    report(
        "weight_sync",
        samples,
        config=f"{MODEL}, {version_bytes / 2**20:.0f} MiB in buckets of {bucket_bytes >> 20} MiB, {engine} engines",
    )


@contextmanager
def over_tcp(gang: LearnerGroup, receivers: int, bucket_bytes: int) -> Iterator[Measure]:
    """Learner 0 to stores of other nodes, which are on this machine here."""
    with Stores(gang, receivers, bucket_bytes) as stores:
        for _ in range(WeightSlots.COUNT):  # touches the memory
            stores.send()

        def measure(ceiling: Ceiling) -> dict[str, float]:
            gib_per_s, sent = stores.send()
            told(f"over TCP to {receivers}", gib_per_s, sent.seconds)
            return {
                f"tcp_gib_per_s_{receivers}": gib_per_s,
                f"tcp_over_gloo_{receivers}": gib_per_s / ceiling.gloo[receivers],
            }

        yield measure


@contextmanager
def on_this_node(gang: LearnerGroup, model_dir: str, engine: str, replicas: int) -> Iterator[Measure]:
    """A `publish` to replicas on the node of learner 0."""
    with Engines(gang, model_dir, engine, replicas) as engines:
        for _ in range(WeightSlots.COUNT):  # touches the memory
            engines.publish()

        def measure(ceiling: Ceiling) -> dict[str, float]:
            published: Published = engines.publish()
            # Until it is whole in the node's memory with its checksums, as over TCP.
            gib_per_s = published.nbytes / 2**30 / published.broadcast_s
            verified = published.nbytes / 2**30 / (published.broadcast_s + published.seconds["verify"])
            told(f"{replicas} replicas on this node", gib_per_s, published.seconds)
            return {
                f"shm_gib_per_s_{replicas}": gib_per_s,
                f"shm_over_memcpy_{replicas}": gib_per_s / ceiling.memcpy,
                f"shm_verified_over_memcpy_{replicas}": verified / ceiling.memcpy,
                f"control_calls_{replicas}": float(published.control_calls),
                f"publish_and_apply_s_{replicas}": published.broadcast_s + published.apply_s,
                f"load_s_{replicas}": published.seconds["load"],
            }

        yield measure


def told(what: str, gib_per_s: float, seconds: Mapping[str, float]) -> None:
    """Print a split of time."""
    parts = ", ".join(f"{part} {value:.3f} s" for part, value in seconds.items())
    print(f"{what}: {gib_per_s:.2f} GiB/s; {parts}", flush=True)


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
