"""Between OpenAI's Responses API, which NeMo Gym speaks, and the chat messages that raygym renders."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raygym.env import EnvError
from raygym.types import Message

# The opening tag is missing where the chat template writes it as part of the prompt.
_REASONING = re.compile(r"\A\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)


def chat_tools(tools: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools of a Responses request in the chat API's form, without `strict`, which means nothing to an open model."""
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key not in ("type", "strict")}}
        for tool in tools or ()
    ]


def chat_messages(params: Mapping[str, Any]) -> list[Message]:
    """`instructions` and `input` of a Responses request as chat messages.

    The system and developer messages that begin it become one system message, the form that every chat template knows.

    Raises:
        EnvError: an item has no chat form, such as an image.
    """
    given = params["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = items_to_messages(items)
    leading = [params["instructions"]] if params.get("instructions") else []
    while messages and messages[0]["role"] in ("system", "developer"):
        leading.append(messages.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(leading)}, *messages] if leading else messages


def items_to_messages(items: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Input or output items as chat messages; the items of one assistant turn become one message.

    Raises:
        EnvError: an item has no chat form.
    """
    messages: list[Message] = []
    for item in items:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item.get("content"))})
        elif kind == "message":
            _assistant(messages)["content"] += _text(item.get("content"))
        elif kind == "reasoning":
            thoughts = "".join(str(part.get("text", "")) for part in item.get("summary") or ())
            _assistant(messages)["content"] += f"<think>{thoughts}</think>" if thoughts else ""
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append(tool_message(item["call_id"], _text(item["output"])))
        else:
            raise EnvError(f"NeMo Gym: an item of type {kind!r} cannot be shown to the policy as a chat message")
    return messages


def tool_message(call_id: str, output: str) -> Message:
    """A tool's output as the policy sees it."""
    return {"role": "tool", "tool_call_id": call_id, "content": output}


def output_items(action: Message) -> list[dict[str, Any]]:
    """The assistant's message as output items: reasoning, text, and one `function_call` for each tool call."""
    text, thoughts = str(action.get("content") or ""), str(action.get("reasoning_content") or "")
    if (found := _REASONING.match(text)) and "</think>" in text:
        thoughts, text = thoughts + found[1].strip(), text[found.end() :]
    items: list[dict[str, Any]] = []
    if thoughts:
        summary = [{"type": "summary_text", "text": thoughts}]
        items.append({"id": _new_id("rs"), "type": "reasoning", "summary": summary})
    calls = action.get("tool_calls") or []
    if text or not calls:
        items.append(
            {
                "id": _new_id("msg"),
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": text, "annotations": []}],
            }
        )
    for call in calls:
        function = call["function"]
        items.append(
            {
                "id": _new_id("fc"),
                "type": "function_call",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": arguments_text(function.get("arguments")),
                "status": "completed",
            }
        )
    return items


def arguments_text(arguments: Any) -> str:
    """A call's arguments as JSON text, whichever of the two forms they come in."""
    return arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)


def call_output_item(call_id: str, output: str) -> dict[str, Any]:
    """A tool's output as an item."""
    return {
        "id": _new_id("fco"),
        "type": "function_call_output",
        "call_id": call_id,
        "output": output,
        "status": "completed",
    }


def response_object(params: Mapping[str, Any], items: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """A whole OpenAI response with these output items, as a verifier expects it.

    Args:
        params: the request, `responses_create_params` of the row.
        items: everything after the request's input: the policy's items and the tools' outputs.
        model: name of the policy.
    """
    echoed = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens")
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "model": model,
        "output": list(items),
        "tools": list(params.get("tools") or ()),
        "tool_choice": params.get("tool_choice") or "auto",
        "parallel_tool_calls": params.get("parallel_tool_calls", True),
        **{key: params[key] for key in echoed if params.get(key) is not None},
    }


def _assistant(messages: list[Message]) -> Message:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content:
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise EnvError(f"NeMo Gym: a content part of type {kind!r} cannot be shown to the policy; expected text")
        parts.append(text)
    return "".join(parts)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
