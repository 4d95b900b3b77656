"""Agents that play recorded sessions over HTTP beside a run, and give up when an answer is late."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.client import HTTPException
from types import TracebackType
from typing import Any
from urllib.request import Request, urlopen


class Agents:
    """So many at once, from `with` to its end; what goes wrong for one ends its session and it opens the next."""

    def __init__(self, url: str, agents: int, timeout_s: float) -> None:
        """`url` is the policy's; `timeout_s` of each call."""
        self._url = url
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(agents)]
        self.closed = 0
        """Sessions that were played and closed."""
        self.given_up = 0
        """Sessions that were left open, since a call failed or was late; their time to live ends them."""

    def __enter__(self) -> Agents:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.1):
            done = False
            with suppress(OSError, HTTPException):
                session = f"{self._url}/sessions/{self._call('POST', f'{self._url}/sessions', {})['id']}"
                chat = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 8}
                for _ in range(2):
                    self._call("POST", f"{session}/v1/chat/completions", chat)
                self._call("DELETE", session)
                done = True
            self.closed, self.given_up = self.closed + done, self.given_up + (not done)

    def _call(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(url, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=self._timeout_s) as answer:
            return json.loads(answer.read() or b"null")
