"""One function as a tool: its OpenAI schema, the check of its arguments, and its result as text."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import from_json, to_json

from raygym.env import EnvError

_SHOWN = 120
"""Characters of a wrong value that an error text repeats."""


class ToolError(ValueError):
    """A call that cannot be made. The text, for the policy, says what was wrong and what was expected.

    A tool may raise it too: its text is shown as it is, where other exceptions are shown with their type.
    """


class _Untitled(GenerateJsonSchema):
    """Pydantic's titles repeat the names; they would cost prompt tokens in every episode."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy can call."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    """OpenAI's form: `{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`."""
    model: type[BaseModel]
    """Validates the arguments. Its fields have other names, with the arguments' own as aliases, since an argument may
    be called like a method of pydantic's."""
    signature: str

    @staticmethod
    def of(function: Callable[..., Any]) -> Tool:
        """Describe a function or a bound method. What is found is remembered: environments are made per episode.

        Raises:
            EnvError: it lacks a docstring or a type hint, or takes arguments that cannot be given by name.
        """
        plain = getattr(function, "__func__", None)
        if plain is None:
            return _described(function, False)
        return replace(_described(plain, True), function=function)

    def arguments(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of one call, converted to the types of the hints.

        Args:
            arguments: JSON text of an object, as the policy wrote it; nothing at all counts as `{}`.

        Raises:
            ToolError: it is no JSON object, or an argument is missing, unknown or of the wrong type.
        """
        try:
            given = (
                from_json(arguments.strip() or "{}", allow_inf_nan=False) if isinstance(arguments, str) else arguments
            )
        except ValueError as error:
            raise ToolError(
                f"the arguments of {self.name} are not valid JSON ({error}); expected an object for {self.signature}"
            ) from error
        if not isinstance(given, Mapping):
            raise ToolError(
                f"the arguments of {self.name} are {_shown(given)}; expected a JSON object for {self.signature}"
            )
        try:
            checked = self.model.model_validate(given)
        except ValidationError as error:
            wrong = "; ".join(_problem(problem) for problem in error.errors(include_url=False))
            raise ToolError(f"wrong arguments for {self.name}: {wrong}. Expected {self.signature}") from error
        fields = type(checked).model_fields
        return {str(fields[key].alias): getattr(checked, key) for key in checked.model_fields_set}


def as_text(result: Any) -> str:
    """A tool's result as the policy sees it: text as it is, None as `done`, everything else as JSON."""
    if result is None:
        return "done"
    if isinstance(result, str):
        # A lone surrogate (out of a file name, say) cannot be tokenized.
        return result.encode("utf-8", "replace").decode()
    return to_json(result, fallback=str, inf_nan_mode="constants").decode("utf-8", "replace")


@lru_cache(maxsize=1024)
def _described(function: Callable[..., Any], bound: bool) -> Tool:
    name = getattr(function, "__name__", type(function).__name__)
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    description = "\n\n".join(
        part for part in (documentation.short_description, documentation.long_description) if part
    )
    if not description:
        raise EnvError(f"tool {name}: it has no docstring; expected one that tells the policy what the tool does")
    meanings = {parameter.arg_name: parameter.description for parameter in documentation.params}
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[bound:]
    hints = _hints(name, function)
    fields: dict[str, Any] = {}
    for index, parameter in enumerate(parameters):
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise EnvError(f"tool {name}: argument {parameter} cannot be given by name; expected named arguments only")
        if parameter.name not in hints:
            raise EnvError(f"tool {name}: argument {parameter.name} has no type hint; expected one, such as int or str")
        options: dict[str, Any] = {"alias": parameter.name}
        if parameter.default is not inspect.Parameter.empty:
            options["default"] = parameter.default
        if meanings.get(parameter.name):
            options["description"] = meanings[parameter.name]
        fields[f"argument_{index}"] = hints[parameter.name], Field(**options)
    try:
        model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        schema = model.model_json_schema(schema_generator=_Untitled)
    except PydanticUserError as error:
        raise EnvError(f"tool {name}: its type hints have no JSON schema: {error.message}") from error
    del schema["title"]
    schema.setdefault("properties", {})
    shown = signature.replace(
        parameters=[p.replace(annotation=hints[p.name]) for p in parameters], return_annotation=inspect.Signature.empty
    )
    return Tool(
        name=name,
        function=function,
        schema={"type": "function", "function": {"name": name, "description": description, "parameters": schema}},
        model=model,
        signature=f"{name}{shown}",
    )


def _hints(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise EnvError(
            f"tool {name}: its type hints cannot be read ({error}); expected names that its module defines"
        ) from error


def _problem(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where} is no argument of it"
    return f"{where}: {problem['msg']}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    text = to_json(value, fallback=str, inf_nan_mode="constants").decode("utf-8", "replace")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
