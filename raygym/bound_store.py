"""The store by which a process group's members find each other, listening on one address.

PyTorch's own way listens on all of the machine's addresses, and anybody who reaches it can read and write.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

Rendezvous = tuple[str, int]
"""Host and port."""


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of `host`, for `bound_store` of rank 0. From now on, nobody else gets it."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.bind((host, 0))
    listening.listen()
    return listening


def bound_store(
    rendezvous: Rendezvous, size: int, timeout: timedelta, listening: socket.socket | None = None
) -> TCPStore:
    """The store of one member.

    Args:
        rendezvous: where rank 0 listens.
        size: of the group.
        timeout: for whoever waits for a key, and for connecting.
        listening: of rank 0, which keeps the store; it is taken over. None for all others.
    """
    host, port = rendezvous
    if listening is None:
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    return TCPStore(
        host, port, size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listening.detach()
    )
