"""Request bodies for fuzzing the HTTP API: valid ones with some fields changed, dropped or added, or cut as bytes."""

from __future__ import annotations

import json
import random
from typing import Any

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a place.",
        "strict": True,
        # Short values: a random model never ends a string by itself.
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["north", "south"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}

# Without `strict`, no grammar cuts the distribution, so the tokens can be trained.
FREE_LOOK = {"type": "function", "function": {k: v for k, v in LOOK["function"].items() if k != "strict"}}

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**9, -(10**9), 2**63, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "",
    "x", "\x00", "\ud800", "auto", "none", "required", "json_object", "text", [], [[]], [None], [1], ["x"], [-1],
    [10**12],
    {}, {"x": 1}, {"type": "text"}, {"type": "json_schema"}, {"type": "function"}, [{}], [{"role": "user"}],
    [{"role": "tool", "content": "x"}], [{"role": "assistant"}], [{"role": "alien", "content": "x"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "video"}]}], [{"role": "user", "content": [{"text": "x"}]}],
    [{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "look", "arguments": "{"}}]}],
    [{"role": "assistant", "content": "x", "prompt_token_ids": [1], "generation_token_ids": [10**6]}],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "alien"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "("}}},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "alien"}}}],
    [{"type": "function", "function": {"name": "f", "parameters": "x"}}], [{"type": "web_search"}],
    {"type": "function", "function": {"name": "nobody"}}, {"include_usage": True}, {"5": 100}, {"-1": 1}, {"a": "b"},
    {"regex": "("}, {"grammar": "x ::="}, {"json": "{"}, {"choice": []}, {"choice": [""]}, {"structural_tag": "{"},
]  # fmt: skip
FIELDS = {
    "/v1/chat/completions": (
        "model messages temperature top_p top_k min_p max_tokens max_completion_tokens n stop seed logprobs "
        "top_logprobs logit_bias presence_penalty frequency_penalty repetition_penalty response_format tools "
        "tool_choice stream stream_options user metadata parallel_tool_calls return_token_ids "
        "return_tokens_as_token_ids prompt_logprobs echo add_generation_prompt continue_final_message "
        "chat_template chat_template_kwargs documents min_tokens ignore_eos stop_token_ids bad_words "
        "allowed_token_ids structured_outputs priority kv_transfer_params vllm_xargs use_beam_search "
        "truncate_prompt_tokens cache_salt mm_processor_kwargs add_special_tokens skip_special_tokens "
        "reasoning_effort required_prefix_token_ids request_id length_penalty spaces_between_special_tokens "
        "include_stop_str_in_output"
    ),
    "/v1/completions": (
        "model prompt temperature top_p max_tokens n best_of stop seed logprobs echo suffix logit_bias stream "
        "stream_options prompt_embeds response_format structured_outputs return_token_ids prompt_logprobs "
        "min_tokens ignore_eos truncate_prompt_tokens add_special_tokens kv_transfer_params use_beam_search "
        "presence_penalty stop_token_ids"
    ),
    "/v1/responses": (
        "model input instructions max_output_tokens temperature top_p tools tool_choice stream store include text "
        "reasoning previous_response_id background metadata truncation top_logprobs parallel_tool_calls prompt "
        "max_tool_calls user service_tier previous_input_messages return_token_ids structured_outputs"
    ),
    "/tokenize": (
        "model prompt messages add_special_tokens add_generation_prompt continue_final_message tools chat_template"
    ),
    "/detokenize": "model tokens",
    "/sessions": "profile metadata",
}


def fuzzed(seed: int, model: str) -> tuple[str, Any]:
    """A path and a body: a valid one with some fields changed, dropped or added, or cut as bytes."""
    pick = random.Random(seed)
    path = pick.choice(list(FIELDS))
    body: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        "/v1/completions": {"prompt": "hi", "max_tokens": 4},
        "/v1/responses": {"input": "hi", "max_output_tokens": 4},
        "/tokenize": {"prompt": "hi"},
        "/detokenize": {"tokens": [1, 2, 3]},
        "/sessions": {},
    }[path] | {"model": model}
    if pick.random() < 0.3 and path == "/v1/chat/completions":
        body["tools"] = [LOOK]
    for _ in range(pick.choice([1, 1, 2, 3])):
        body[pick.choice(FIELDS[path].split())] = json.loads(json.dumps(pick.choice(ODD)))
    if pick.random() < 0.1:
        # Without max_tokens a random model talks until its context is full.
        body.pop(
            pick.choice([key for key in body if key not in ("max_tokens", "max_output_tokens")] or ["model"]), None
        )
    for limit in ("max_tokens", "max_output_tokens"):
        if limit in body and body[limit] is None:
            body[limit] = 4
    if pick.random() < 0.05:
        raw = json.dumps(body).encode()
        return path, raw[: pick.randrange(len(raw))]
    return path, body
