"""Messages over a byte stream: each is preceded by its length, and what is sent in one moment leaves as one write."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 28


class Frames(asyncio.Protocol):
    """One end of a connection. Subclasses say what a frame and the end of the connection mean."""

    transport: asyncio.Transport | None = None
    max_frame_bytes = MAX_FRAME_BYTES
    """A longer frame ends the connection: the other side is not one of ours."""

    def __init__(self) -> None:
        """Not connected yet."""
        self._unread = bytearray()

    def received(self, frame: bytes) -> None:
        """One whole message of the other side."""
        raise NotImplementedError

    def ended(self) -> None:
        """The connection is gone; nothing more will come."""
        raise NotImplementedError

    def send(self, frame: bytes) -> None:
        """Send one message, unless the connection is gone, which `ended` tells."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(_LENGTH.pack(len(frame)) + frame)

    def close(self) -> None:
        """End the connection, without waiting for what was not sent yet."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        # uvloop's transports are none of asyncio's classes.
        self.transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Without it, the death of the other machine would never be noticed.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        self._unread += data
        at = 0
        while len(self._unread) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread, at)
            if length > self.max_frame_bytes:
                self.close()
                return
            end = at + _LENGTH.size + length
            if len(self._unread) < end:
                break
            frame = bytes(memoryview(self._unread)[at + _LENGTH.size : end])
            at = end
            self.received(frame)
        if at:
            del self._unread[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self.ended()


class Soon:
    """Calls a function once, when the event loop has done all that is ready now, however often it is asked to."""

    def __init__(self, function: Callable[[], None]) -> None:
        """`function` is what to call."""
        self._function = function
        self._asked = False

    def __call__(self) -> None:
        """Ask for it."""
        if not self._asked:
            self._asked = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._asked = False
        self._function()
