"""HTTP to one of NeMo Gym's servers, for one episode: its cookies, and what a failed call means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from raygym.nemo_gym.endpoints import is_withdrawn, wait_withdrawn
from raygym.types import EpisodeFailure, FailureKind

# The servers close an idle connection after 30 s. Below that, no call is sent into one that is being closed.
_KEEPALIVE_S = 15
_SHOWN = 300


class ServerRefused(Exception):
    """An answer that is no success. `status` and `body` are the server's."""

    def __init__(self, call: str, status: int, body: str) -> None:
        super().__init__(f"{call} answered with status {status}: {excerpt(body)}")
        self.status = status
        self.body = body


class GymClient:
    """Calls of one episode. Cookies of every answer are merged into the next call, as the servers expect."""

    def __init__(self, url: str, name: str, published: Path) -> None:
        """No connection is made before the first call.

        Args:
            url: of the server, without a path.
            name: of the server in NeMo Gym's config.
            published: the file with its address, see `endpoints`.
        """
        self._url = url
        self._name = name
        self._published = published
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            # Addresses instead of names are fine here, and quoting would change a signed cookie.
            cookie_jar=aiohttp.CookieJar(unsafe=True, quote_cookie=False),
            # Whoever calls keeps the deadline.
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def post(self, path: str, body: Any) -> tuple[int, str]:
        """Status and raw body of `POST /<path>`; `path` is one segment, whatever it holds.

        Raises:
            EpisodeFailure: `env_lost`, when the server cannot be reached or breaks off.
        """
        url = URL(f"{self._url}/{quote(path, safe='')}", encoded=True)
        try:
            async with self._session.post(url, json=body, allow_redirects=False) as response:
                return response.status, (await response.read()).decode("utf-8", "replace")
        except aiohttp.ClientError as error:
            await wait_withdrawn(self._published, self._name, self._url)
            detail = f"{self._name} ({self._url}) is gone: {type(error).__name__}: {error}"
            raise EpisodeFailure(FailureKind.ENV_LOST, detail) from error

    async def ask(self, path: str, body: Any) -> Mapping[str, Any]:
        """The JSON object that `POST /<path>` answers with.

        Raises:
            EpisodeFailure: `env_lost` as in `post`, or when the server is being ended; `env_error` when the answer is
                no JSON object.
            ServerRefused: the status is no success.
        """
        status, text = await self.post(path, body)
        call = f"POST /{path} of {self._name}"
        if not 200 <= status < 300:
            # Servers that are being ended together answer their open calls with errors.
            if is_withdrawn(self._published, self._name, self._url):
                raise EpisodeFailure(FailureKind.ENV_LOST, f"{self._name} ({self._url}) was ended: {excerpt(text)}")
            raise ServerRefused(call, status, text)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EpisodeFailure(FailureKind.ENV_ERROR, f"{call} answered with no JSON object: {excerpt(text)}")
        return answer

    async def close(self) -> None:
        """Close the episode's connections."""
        await self._session.close()


def excerpt(text: str) -> str:
    """The beginning of a body, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."
