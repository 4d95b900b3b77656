"""The store of a process group listens where it is told to, and nowhere else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from raygym.bound_store import bound_store, listen

TIMEOUT = timedelta(seconds=20)


def listeners(port: int) -> set[str]:
    found = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_it_listens_on_one_address_and_a_group_forms_over_it() -> None:
    listening = listen("127.0.0.1")
    host, port = listening.getsockname()
    assert listeners(port) == {"127.0.0.1"}

    def member(rank: int) -> float:
        store = bound_store((host, port), 2, TIMEOUT, listening if rank == 0 else None)
        group = dist.ProcessGroupGloo(dist.PrefixStore("test", store), rank, 2, TIMEOUT)
        value = torch.tensor([rank + 1.0])
        group.allreduce([value]).wait()
        if rank == 0:
            assert listeners(port) == {"127.0.0.1"}, "the store opened another socket"
        group.barrier().wait()  # rank 0 keeps the store until all are done
        return float(value)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(member, range(2))) == [3.0, 3.0]
    assert listeners(port) == set()
