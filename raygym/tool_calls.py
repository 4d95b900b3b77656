"""What the policy wrote -> the assistant's message, with its tool calls. For episodes; over HTTP vLLM's parsers do it.

The parsing itself is transformers': a response template says how a model writes calls. Tokenizers that ship one are
read by it, the others by the one below that fits their chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raygym.types import Message

_CONTENT = {"content": "text", "content_args": {"strip": False}, "repeats": True, "join": ""}


def _calls(
    arguments: str = "{content.arguments}", name: str = "{content.name}", also: Any = None, **field: Any
) -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    calls = {"content": "json", "repeats": True, "transform": call, **field}
    # The anchor is where an assistant's message begins in a prompt: here the text is only what was generated.
    return {"start_anchor": "\x00", "fields": {"content": _CONTENT, "tool_calls": calls, **(also or {})}}


_PARAMETER = r"<parameter=(?P<key>[^>]+)>\n?(?P<value>.*?)\n?</parameter>"
# By vLLM's name of the parser, so that `policy.tool_parser` means the same for episodes and over HTTP.
_FORMATS: dict[str, dict[str, Any]] = {
    "hermes": _calls(open="<tool_call>", close="</tool_call>"),
    "qwen3_coder": _calls(
        name="{name}",
        arguments="{content}",
        open_pattern=r"(?:<tool_call>\s*)?<function=(?P<name>[^>]+)>",
        close_pattern=r"</function>(?:\s*</tool_call>)?",
        content="xml-inline",
        content_args={"tag_pattern": _PARAMETER},
    ),
    "llama3_json": _calls(
        arguments="{content.parameters}",
        open_pattern=r'(?:<\|python_tag\|>|\A|;)\s*(?=\{\s*")',
        close_pattern=r"(?<=\})\s*(?=;|\Z)",
    ),
    "mistral": _calls(
        name="{name}",
        arguments="{content}",
        open_pattern=r"\[TOOL_CALLS\](?P<name>[^\[\s{]+)(?:\[ARGS\])?",
        close_pattern=r"(?=\[TOOL_CALLS\]|\Z)",
        # Before its tokenizer's version 11: one list of all calls.
        also={
            "listed_calls": {
                "open_pattern": r"\[TOOL_CALLS\]\s*(?=\[)",
                "content": "json",
                "transform": {"function": {"name": "{name}", "arguments": "{arguments}"}},
                "transform_each": True,
            }
        },
    ),
    "deepseek_v3": _calls(
        name="{name}",
        arguments="{content}",
        open_pattern=r"(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
        close_pattern=r"\n```<｜tool▁call▁end｜>(?:\s*<｜tool▁calls▁end｜>)?",
    ),
    "kimi_k2": _calls(
        name="{name}",
        arguments="{content}",
        open_pattern=(
            r"(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^:<\s]+)(?::\d+)?\s*"
            r"<\|tool_call_argument_begin\|>"
        ),
        close_pattern=r"<\|tool_call_end\|>(?:\s*<\|tool_calls_section_end\|>)?",
    ),
}  # fmt: skip


class ToolCallError(ValueError):
    """A format of tool calls that episodes cannot read. The text says which are known."""


class ToolCalls:
    """Finds calls in what the policy wrote."""

    def __init__(
        self, parser: str, tools: Sequence[Mapping[str, Any]], template: Mapping[str, Any] | None = None
    ) -> None:
        """Read calls of `tools`.

        Args:
            parser: vLLM's name of the format, from `tool_parsers.tool_parser`.
            tools: OpenAI tool schemas; with none, nothing is a call. Where a format writes arguments without types,
                their types are the schema's.
            template: the tokenizer's own response template; takes the place of `parser`.

        Raises:
            ToolCallError: `parser` is not known here.
        """
        self._tools: list[Any] = [dict(tool) for tool in tools]
        if template is None and tools and parser not in _FORMATS:
            raise ToolCallError(
                f"policy.tool_parser: {parser!r} is not known for environments with tools; expected one of "
                f"{', '.join(_FORMATS)}, or a tokenizer with a response_template"
            )
        spec = template or _FORMATS.get(parser)
        self._parse: Callable[[str], Any] | None = None
        if spec and tools:
            # Most of a second to import, in each process that names a class which may parse calls.
            from transformers.utils.chat_parsing import parse_response
            from transformers.utils.chat_parsing.response_templates import load_response_template

            read = load_response_template(dict(spec))
            self._parse = lambda text: parse_response(text, read, prefix="", tools=self._tools)

    def message(self, text: str, call_ids: str) -> Message:
        """The assistant's message for `text`: its content and, where it calls tools, `tool_calls` in OpenAI's form.

        Text that begins a call and does not finish it as the format wants stays content, all of it: the environment
        sees what the policy wrote.

        Args:
            text: what was generated, markers of calls included, without the end of turn.
            call_ids: eight letters or digits that begin the calls' IDs; one more makes each unique in the message.
        """
        if self._parse is None:
            return {"role": "assistant", "content": text}
        try:
            parsed = self._parse(text)
            calls = [_call(found) for key in ("tool_calls", "listed_calls") for found in parsed.get(key) or ()]
        except (ValueError, KeyError, TypeError):  # what a malformed call raises in there
            calls = []
        if not calls:
            return {"role": "assistant", "content": text}
        numbered = [{"id": f"{call_ids}{_DIGITS[i % len(_DIGITS)]}", **call} for i, call in enumerate(calls)]
        return {"role": "assistant", "content": str(parsed.get("content") or "").strip(), "tool_calls": numbered}


# Mistral's templates want IDs of exactly nine letters or digits.
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _call(found: Any) -> dict[str, Any]:
    function = found.get("function", found)
    name, arguments = function["name"], function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": name.strip(), "arguments": arguments}}
