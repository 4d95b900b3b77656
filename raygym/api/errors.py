"""OpenAI's error object, and the exception that becomes one."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 410: "session_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that cannot be served as it is; the text is for the client's author."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        return error_body(self.status, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: Any = None) -> bytes:
    """OpenAI's error object for a status code."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or HTTPStatus(status).name.lower()
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()
