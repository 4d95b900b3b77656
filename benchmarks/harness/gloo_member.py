"""A member of a plain gloo group in a process of its own: what a broadcast of weights is measured beside.

`torch.distributed.ProcessGroupGloo` and nothing of raygym. Arguments: a file to meet at, rank, members, bytes of a
version, bytes of a bucket. One step is one version, broadcast from rank 0 bucket by bucket.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from harness.step_server import StepServer

# Typed as Any: the stubs of torch.distributed lack the store and process-group classes that it exports.
dist: Any = torch.distributed
DEADLINE = timedelta(seconds=120)


def main() -> None:
    """Connect, then broadcast whenever told."""
    server = StepServer()
    meeting_file, *numbers = sys.argv[1:]
    rank, members, version_bytes, bucket_bytes = map(int, numbers)
    group = dist.ProcessGroupGloo(dist.FileStore(meeting_file, members), rank, members, DEADLINE)
    buffer = torch.full((version_bytes,), rank, dtype=torch.uint8)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    while True:
        server.wait()
        group.barrier().wait(DEADLINE)
        started, processor = time.perf_counter(), time.process_time()
        for bucket in buffer.split(bucket_bytes):
            group.broadcast([bucket], options).wait(DEADLINE)
        # Rank 0 has sent everything before everybody has it.
        group.barrier().wait(DEADLINE)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - processor
        server.answer(seconds=seconds, cpu_seconds=cpu_seconds, whole=not buffer.any())
        buffer.fill_(rank)


if __name__ == "__main__":
    main()
