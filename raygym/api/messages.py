"""Message shapes: what clients send, as engines take it; what engines answer, as one chat message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raygym.api.errors import ApiError
from raygym.api.history import Carried, carried_ids, without_ids
from raygym.types import Message


def engine_message(message: Mapping[str, Any], where: str) -> Message:
    """A history message without its IDs, in the shape that every engine accepts.

    Agents send null contents, call arguments as objects, empty lists of calls; templates and vLLM want text.

    Raises:
        ApiError: a shape that means nothing.
    """
    clean = without_ids(message)
    role = clean.get("role")
    if not isinstance(role, str) or not role:
        raise ApiError(400, f"{where}.role: expected a string such as user, found {role!r}", f"{where}.role")
    calls = clean.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise ApiError(400, f"{where}.tool_calls: expected a list, found {calls!r:.80}", f"{where}.tool_calls")
        clean["tool_calls"] = [_engine_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if not calls:
            del clean["tool_calls"]
    content = clean.get("content")
    if content is None:
        clean["content"] = ""
    elif not isinstance(content, str | list):
        problem = f"expected text or a list of parts, found {content!r:.80}"
        raise ApiError(400, f"{where}.content: {problem}", f"{where}.content")
    elif isinstance(content, list) and not all(isinstance(part, str | dict) for part in content):
        raise ApiError(400, f"{where}.content: expected parts that are objects", f"{where}.content")
    return clean


def _engine_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: expected a call with function.name and function.arguments", where)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments)
    elif not _is_json(arguments or "{}"):
        # A call that was cut, or that the policy got wrong: engines refuse it, so it becomes a JSON string.
        arguments = json.dumps(arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def responses_carried(items: Any) -> tuple[list[tuple[int, Carried]], Any]:
    """The IDs on items of a Responses API input, by assistant turn, and the input without them.

    Several items (reasoning, text, calls) make one assistant turn, so IDs are told by the turn that they end.
    """
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return [], items
    carried = carried_ids([{**item, "role": "assistant"} for item in items], "input")
    turns, turn, inside = [], 0, False
    for item in items:
        own = item.get("role") == "assistant" or item.get("type") in ("function_call", "reasoning")
        turn += own and not inside
        inside = own
        turns.append(turn)
    return [(turns[ids.index], ids) for ids in carried], [without_ids(item) for item in items]


def responses_message(response: Mapping[str, Any]) -> Message:
    """The output of a Responses object as one assistant message."""
    text, calls = "", []
    for item in response.get("output") or []:
        if item.get("type") == "message":
            text += "".join(part.get("text") or "" for part in item.get("content") or [])
        elif item.get("type") == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    return message
