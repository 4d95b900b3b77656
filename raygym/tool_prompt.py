"""Tools for policies whose chat template does not show them: told in the system message, in Hermes' form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raygym.types import Message

_INTRODUCTION = (
    "You can call tools. To call one, write a line of this form, with the tool's name and its arguments as JSON:\n"
    '<tool_call>{"name": "...", "arguments": {...}}</tool_call>\n'
    "The tools:"
)


def with_tools_told(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation with the tools at the end of its system message, which is added where there is none."""
    told = "\n".join([_INTRODUCTION, *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
    if messages and messages[0].get("role") == "system":
        system = messages[0]
        return [{**system, "content": f"{system['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]
