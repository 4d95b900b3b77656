"""What the policy wrote, read as calls: every format, malformed ones, and the same answers as vLLM's own parsers."""

from __future__ import annotations

import json
from typing import Any

import loaded
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.chat import ChatRenderer
from raygym.tool_calls import ToolCallError, ToolCalls

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find things.",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "count": {"type": "integer"}, "deep": {"type": "boolean"}},
            },
        },
    }
]
Arguments = dict[str, Any]


def hermes(calls: list[Arguments]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "find", "arguments": {json.dumps(a)}}}\n</tool_call>' for a in calls)


def qwen3_coder(calls: list[Arguments]) -> str:
    def parameters(call: Arguments) -> str:
        as_text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in call.items()}
        return "\n".join(f"<parameter={key}>\n{value}\n</parameter>" for key, value in as_text.items())

    return "\n".join(f"<tool_call>\n<function=find>\n{parameters(a)}\n</function>\n</tool_call>" for a in calls)


def llama3_json(calls: list[Arguments]) -> str:
    return "; ".join(f'{{"name": "find", "parameters": {json.dumps(a)}}}' for a in calls)


def mistral(calls: list[Arguments]) -> str:
    return "".join(f"[TOOL_CALLS]find[ARGS]{json.dumps(a)}" for a in calls)


def mistral_list(calls: list[Arguments]) -> str:
    return f"[TOOL_CALLS] {json.dumps([{'name': 'find', 'arguments': a} for a in calls])}"


def deepseek_v3(calls: list[Arguments]) -> str:
    one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```<｜tool▁call▁end｜>"
    body = "\n".join(one.replace("{}", json.dumps(a)) for a in calls)
    return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"


def kimi_k2(calls: list[Arguments]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.find:{i}<|tool_call_argument_begin|>{json.dumps(a)}<|tool_call_end|>"
        for i, a in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


WRITERS = {
    "hermes": [hermes],
    "qwen3_coder": [qwen3_coder],
    "llama3_json": [llama3_json],
    "mistral": [mistral, mistral_list],
    "deepseek_v3": [deepseek_v3],
    "kimi_k2": [kimi_k2],
}
CASES = [(parser, writer) for parser, writers in WRITERS.items() for writer in writers]
CALLS: list[list[Arguments]] = [
    [{"text": "a hill"}],
    [{"text": "", "count": 3}, {"text": "x; y", "deep": True}],
    [{}],
    [{"text": 'a "quoted" {brace} <tag> ünïcode\nsecond line', "count": -1}],
]


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])
    ]


@pytest.mark.parametrize(("parser", "write"), CASES)
@pytest.mark.parametrize("calls", CALLS)
def test_calls_are_found(parser: str, write: Any, calls: list[Arguments]) -> None:
    message = ToolCalls(parser, TOOLS).message(write(calls), "c0000003")
    assert calls_of(message) == [("find", arguments) for arguments in calls]
    assert message["content"] == ""
    assert [call["id"] for call in message["tool_calls"]] == [f"c0000003{i}" for i in range(len(calls))]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "mistral", "deepseek_v3", "kimi_k2"])
def test_text_before_a_call_is_content(parser: str) -> None:
    message = ToolCalls(parser, TOOLS).message("I look.\n" + WRITERS[parser][0]([{"text": "a"}]), "c0000000")
    assert message["content"] == "I look."
    assert calls_of(message) == [("find", {"text": "a"})]


@pytest.mark.parametrize(("parser", "write"), CASES)
def test_a_cut_call_is_content_or_whole(parser: str, write: Any) -> None:
    """Cut anywhere: either nothing is a call and the whole text is content, or what is found was written in full."""
    text = write([{"text": "one"}, {"text": "two"}])
    for end in range(len(text)):
        message = ToolCalls(parser, TOOLS).message(text[:end], "c0000000")
        found = calls_of(message)
        if not found:
            assert message == {"role": "assistant", "content": text[:end]}
        assert found in ([], [("find", {"text": "one"})], [("find", {"text": "one"}), ("find", {"text": "two"})]) or (
            # Its parameters are elements of their own: a whole one may be missing, none is made up.
            parser == "qwen3_coder"
            and all(arguments in ({}, {"text": "one"}, {"text": "two"}) for _, arguments in found)
        )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(WRITERS)), st.text(alphabet='<>{}[]"\\:,tool_calfn/|;=\n', max_size=60))
def test_anything_may_be_written(parser: str, text: str) -> None:
    message = ToolCalls(parser, TOOLS).message(text, "c0000000")
    assert "tool_calls" in message or message["content"] == text


def test_without_tools_nothing_is_a_call() -> None:
    text = hermes([{"text": "a"}])
    assert ToolCalls("unheard-of", []).message(text, "c0000000") == {"role": "assistant", "content": text}


def test_an_unknown_format_is_told() -> None:
    with pytest.raises(ToolCallError, match=r"policy\.tool_parser: 'pythonic' is not known .*hermes"):
        ToolCalls("pythonic", TOOLS)


def test_a_tokenizers_own_template_is_used() -> None:
    call = {"function": {"name": "{name}", "arguments": "{content}"}}
    field = {
        "open_pattern": r"CALL (?P<name>\w+) ",
        "close": ";",
        "content": "json",
        "repeats": True,
        "transform": call,
    }
    template = {"start_anchor": "A:", "fields": {"content": {"content": "text"}, "tool_calls": field}}
    message = ToolCalls("unheard-of", TOOLS, template).message('Hm. CALL find {"text": "a"};', "c0000000")
    assert (message["content"], calls_of(message)) == ("Hm.", [("find", {"text": "a"})])


class TestWithAChatTemplate:
    @pytest.fixture(scope="class")
    @classmethod
    def renderer(cls) -> ChatRenderer:
        tokenizer = loaded.tokenizer("tiny")
        return ChatRenderer(tokenizer, TOOLS, calls=ToolCalls("hermes", TOOLS))

    def test_a_template_without_a_place_for_tools_tells_them_in_the_system_message(
        self, renderer: ChatRenderer
    ) -> None:
        for opening in ([], [{"role": "system", "content": "Be brief."}]):
            prompt = renderer.render_initial([*opening, {"role": "user", "content": "Go."}])
            text = renderer.decode(prompt, special=True)
            assert text.count("<|im_start|>system") == 1
            assert text.count('"name": "find"') == 1
            assert ("Be brief." in text) == bool(opening)

    def test_the_stop_token_is_no_part_of_the_message(self, renderer: ChatRenderer) -> None:
        text = hermes([{"text": "a"}])
        tokenizer = loaded.tokenizer("tiny")
        ids = tokenizer.encode(text, add_special_tokens=False)
        for ending in ([], [renderer.end_of_turn_id]):
            message = renderer.assistant_message(np.asarray([*ids, *ending], np.int32), "c0000000")
            assert calls_of(message) == [("find", {"text": "a"})]
        plain = tokenizer.encode("No call", add_special_tokens=False)
        message = renderer.assistant_message(np.asarray([*plain, renderer.end_of_turn_id], np.int32), "c0000000")
        assert message == {"role": "assistant", "content": "No call"}


@pytest.mark.vllm
@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "qwen3_coder"])
def test_as_vllm_reads_it(parser: str) -> None:
    """The same text gives the same calls over HTTP and in episodes."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    tokenizer = loaded.tokenizer("smollm2-135m-instruct")
    if parser == "llama3_json":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|python_tag|>"]})
    if parser == "qwen3_coder":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Go."}], tools=TOOLS)
    theirs = ToolParserManager.get_tool_parser(parser)(tokenizer, request.tools)
    ours = ToolCalls(parser, TOOLS)
    write = WRITERS[parser][0]
    for text in ["No call.", *(write(calls) for calls in CALLS), write([{"text": "a"}])[:-12]]:
        found = theirs.extract_tool_calls(text, request)
        expected = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
        assert calls_of(ours.message(text, "c0000000")) == expected, text
