"""What is wrong with an environment's tool schemas, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_EXPECTED = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'


def tool_problems(tools: Any) -> list[str]:
    """Every way in which `tools` is no list of OpenAI tool schemas; [] is good."""
    if not isinstance(tools, list | tuple):
        return [f"tools is {type(tools).__name__} {tools!r:.80}; expected a list of {_EXPECTED}"]
    problems = [problem for index, tool in enumerate(tools) for problem in _one(f"tools[{index}]", tool)]
    if not problems:
        names = [tool["function"]["name"] for tool in tools]
        repeated = sorted({name for name in names if names.count(name) > 1})
        problems += [f"tools: two are called {name!r}; give each its own name" for name in repeated]
    return problems


def _one(where: str, tool: Any) -> list[str]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        return [f"{where} is {tool!r}; expected {_EXPECTED}"]
    problems = []
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"{where}.function.name is {name!r}; expected 1 to 64 letters, digits, _ or -")
    if not isinstance(function.get("description", ""), str):
        problems.append(f"{where}.function.description is {function['description']!r}; expected text")
    if "parameters" in function:
        problems += _parameters(f"{where}.function.parameters", function["parameters"])
    try:
        json.dumps(tool)
    except (TypeError, ValueError) as error:
        problems.append(f"{where} cannot be written as JSON: {error}")
    return problems


def _parameters(where: str, schema: Any) -> list[str]:
    # {} is what OpenAI's API takes for "no parameters".
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        return [f'{where} is {schema!r}; expected a JSON schema with "type": "object"']
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return [f"{where} is no JSON schema: {error.message} (at {error.json_path})"]
    properties = schema.get("properties", {})
    unknown = [name for name in schema.get("required", ()) if name not in properties]
    return [f"{where}.required names {name!r}, which is not in properties" for name in unknown]
