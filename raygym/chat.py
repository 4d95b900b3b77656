"""Chat messages to token IDs and back, without ever tokenizing history twice.

The rule: the policy's own tokens are kept as they were sampled; only messages that came after them are rendered. To
render them alone, a fixed base conversation that ends in an assistant message is rendered together with them, and what
follows the assistant's text is the suffix: the end of its turn, the new messages, and the next generation prompt.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from raygym.tool_calls import ToolCalls
from raygym.tool_prompt import with_tools_told
from raygym.types import Int32Array, Message

# Random, so that no message of an agent's can contain it.
_SENTINEL = f"raygym{secrets.token_hex(8)}"
_QUESTION: Message = {"role": "user", "content": "Hello"}
_REPLY: Message = {"role": "assistant", "content": _SENTINEL}
_BASE = [_QUESTION, _REPLY]
_SUFFIX_KEPT_UP_TO = 500
_SUFFIXES_KEPT = 2_000
_CALL_ID = "call00000"  # nine letters and digits: some templates refuse any other form
_TOOL_RESULT: Message = {"role": "tool", "content": "done", "tool_call_id": _CALL_ID, "name": "tool"}

Render = Callable[[Sequence[Message], bool], str]
"""A conversation, and whether the next generation prompt follows it, to text."""


class TemplateError(ValueError):
    """A chat template that cannot be used for token-exact episodes, or messages that it cannot render."""


class Tokenizer(Protocol):
    """What raygym needs of a Hugging Face tokenizer."""

    all_special_ids: list[int]

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Render a conversation."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text to token IDs."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Token IDs to text."""


class ChatRenderer:
    """Renders conversations for one tokenizer and one set of tools."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[dict[str, Any]] = (),
        roles: Collection[str] = ("system", "user", "assistant"),
        render: Render | None = None,
        calls: ToolCalls | None = None,
    ) -> None:
        """Take the tokenizer's chat template, after verifying it.

        Args:
            tokenizer: its chat template is used.
            tools: OpenAI tool schemas shown to the policy: by the template, or in the system message where the template
                has no place for them.
            roles: what environments of the run use; `tool` is added where there are tools.
            render: takes the place of the tokenizer's own template, tools included.
            calls: finds tool calls in what the policy wrote; without it nothing is one.

        Raises:
            TemplateError: the template cannot keep history's tokens; the text says how it breaks the rule.
        """
        self._tokenizer = tokenizer
        self._tools = list(tools)
        self._template = render or self._own_template
        self._calls = calls
        # Where a template of the caller's renders, the tools are in its hands.
        self._tools_told = render is None and bool(tools) and self._hides_tools()
        self._roles = set(roles) | ({"tool"} if tools else set())
        self._suffixes: dict[str, list[int]] = {}
        """Tokens of new messages, by their JSON."""
        self._special = frozenset(tokenizer.all_special_ids)
        self._closing = self._tokens(_after_sentinel(self._render(_BASE, generation=False)))
        if not self._closing or self._closing[0] not in self._special:
            raise TemplateError(
                "chat template: an assistant message is not followed directly by a special end-of-turn token, but by "
                f"{tokenizer.decode(self._closing)!r}; a cut generation could not be closed. Use a template that ends "
                "every turn with a special token"
            )
        self.end_of_turn_id: int = self._closing[0]
        self._end_of_turn = str(tokenizer.decode([self.end_of_turn_id]))
        self.verify()

    def render_initial(self, messages: Sequence[Message]) -> Int32Array:
        """The prompt of the first turn: the whole template with the generation prompt, P token IDs."""
        return np.asarray(self._tokens(self._render(messages, generation=True)), np.int32)

    def extend(self, token_ids: Int32Array, new_messages: Sequence[Message]) -> Int32Array:
        """The next turn's prompt: `token_ids` unchanged, then only what came after them.

        Args:
            token_ids: everything that the policy saw and produced, ending with its last generation.
            new_messages: what came after that generation.

        Returns:
            `token_ids`, the end of turn unless it is already their last token (a generation that was cut, or that ended
            in another stop token, lacks it), the new messages, and the generation prompt.

        Raises:
            TemplateError: the template cannot render the new messages after an assistant's.
        """
        suffix = self._suffix(new_messages)
        closed = len(token_ids) > 0 and int(token_ids[-1]) == self.end_of_turn_id
        return np.concatenate([np.asarray(token_ids, np.int32), np.asarray(suffix[closed:], np.int32)])

    def decode(self, token_ids: Int32Array, *, special: bool = False) -> str:
        """The text of `token_ids`, with special tokens such as the end of turn only when asked for."""
        return str(
            self._tokenizer.decode(
                token_ids.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def assistant_message(self, token_ids: Int32Array, call_ids: str) -> Message:
        """The message that a generation amounts to: content and, where it calls tools, `tool_calls`.

        Args:
            token_ids: one generation, with its stop token if it has one.
            call_ids: see `ToolCalls.message`.
        """
        if self._calls is None or not self._tools:
            return {"role": "assistant", "content": self.decode(token_ids)}
        # Models may mark calls with special tokens; only the stop token is not part of what was written.
        stopped = len(token_ids) > 0 and int(token_ids[-1]) in self._special
        return self._calls.message(self.decode(token_ids[: len(token_ids) - stopped], special=True), call_ids)

    def drifted(self, messages: Sequence[Message], token_ids: Int32Array) -> bool:
        """Whether re-rendering the history would have given other IDs than those that the policy saw or produced.

        Compared are two sequences, both cut at the end of the last assistant message's content: the template's whole
        conversation up to that message, tokenized anew, without the closing of its last turn; and `token_ids` without
        one special token at their end (a stop token, absent when the last generation was cut). They must be equal. A
        conversation that the template refuses as a whole counts as drifted.

        Args:
            messages: the conversation; what follows the last assistant message is ignored.
            token_ids: prompts and generations so far, ending with the last generation.
        """
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        try:
            rendered = self._tokens(self._render(messages[: last + 1], generation=False))
        except TemplateError:
            return True
        actual = token_ids.tolist()
        if actual and actual[-1] in self._special:
            actual.pop()
        return bool(rendered[len(rendered) - len(self._closing) :] != self._closing) or (
            rendered[: len(rendered) - len(self._closing)] != actual
        )

    def verify(self) -> None:
        """Check the template with a conversation of every role: extending must equal rendering the whole.

        Raises:
            TemplateError: it does not, or the template refuses a role.
        """
        opening = [_QUESTION]
        if "system" in self._roles:
            opening.insert(0, {"role": "system", "content": "Be brief."})
        news: list[list[Message]] = [[{"role": "user", "content": "Go on"}]]
        if "tool" in self._roles:
            news += [[_TOOL_RESULT], [_TOOL_RESULT, {**_TOOL_RESULT, "content": "done too"}]]
        prompt = self.render_initial(opening)
        for new in news:
            # From the first generation on only the suffix is rendered; what precedes it may be rewritten by a template
            # that strips reasoning, but the suffix must not depend on how long the history is.
            whole = self._render([*opening, _reply_before(new), *new], generation=True)
            if self._tokens(self._from_end_of_turn(whole, new)) != self._suffix(new):
                raise TemplateError(
                    f"chat template: what it writes for a new {new[0]['role']} message depends on the messages before "
                    "it; history would have to be rendered again. Use a template that renders each message on its own"
                )
            generated = np.asarray([*self._tokens(_SENTINEL), self.end_of_turn_id], np.int32)
            extended = self.extend(np.concatenate([prompt, generated]), new)
            assert np.array_equal(extended[: len(prompt)], prompt)

    def _suffix(self, new_messages: Sequence[Message]) -> list[int]:
        # Environments say the same short things again and again; rendering one is a third of what a turn costs here.
        try:
            said = json.dumps(list(new_messages))
        except TypeError:  # an object of the environment's own
            return self._new_suffix(new_messages)
        if len(said) > _SUFFIX_KEPT_UP_TO:
            return self._new_suffix(new_messages)
        if said not in self._suffixes:
            if len(self._suffixes) >= _SUFFIXES_KEPT:
                self._suffixes.pop(next(iter(self._suffixes)))
            self._suffixes[said] = self._new_suffix(new_messages)
        return self._suffixes[said]

    def _new_suffix(self, new_messages: Sequence[Message]) -> list[int]:
        base = [_QUESTION, _reply_before(new_messages)]
        text = self._render([*base, *new_messages], generation=True)
        return self._tokens(self._from_end_of_turn(text, new_messages))

    def _from_end_of_turn(self, text: str, new_messages: Sequence[Message]) -> str:
        """What a render says from the end of the sentinel's turn on."""
        if not _calls_tools(new_messages):
            suffix = _after_sentinel(text)
            if not suffix.startswith(self._end_of_turn):
                role = new_messages[0]["role"] if new_messages else "no"
                closing = self._tokenizer.decode(self._closing)
                raise TemplateError(
                    f"chat template: a {role} message after an assistant's changes how the assistant's turn ends (it "
                    f"is followed by {suffix[:20]!r}, else by {closing!r})"
                )
            return suffix
        # The calls may be written after the text or instead of it; the last sentinel stands in their arguments.
        _, found, rest = text.rpartition(_SENTINEL)
        end = rest.find(self._end_of_turn)
        if not found or end < 0:
            raise TemplateError(
                "chat template: it shows neither the text nor the calls of an assistant message that calls tools, or "
                f"does not end it with {self._end_of_turn!r}; new messages cannot be told from old ones"
            )
        return rest[end:]

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        try:
            return self._template(messages, generation)
        except Exception as error:  # Jinja, and whatever a template's own functions raise
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"chat template: it cannot render a conversation of the roles {roles}: {type(error).__name__}: {error}"
            ) from error

    def _own_template(self, messages: Sequence[Message], generation: bool) -> str:
        if self._tools_told:
            messages = with_tools_told(messages, self._tools)
        return self._applied(messages, generation, self._tools or None)

    def _applied(self, messages: Sequence[Message], generation: bool, tools: list[dict[str, Any]] | None) -> str:
        plain = [_for_template(message) for message in messages]
        return str(
            self._tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=generation)
        )

    def _hides_tools(self) -> bool:
        """Whether the tokenizer's template shows no tools: the policy could not know of them."""
        try:
            return self._applied([_QUESTION], True, self._tools) == self._applied([_QUESTION], True, None)
        except Exception:  # whatever it cannot render is told with its reason when the template is verified
            return False

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _calls_tools(new_messages: Sequence[Message]) -> bool:
    return bool(new_messages) and new_messages[0].get("role") == "tool"


def _reply_before(new_messages: Sequence[Message]) -> Message:
    """The base's assistant message, of the same shape as the one that the new messages answer."""
    if not _calls_tools(new_messages):
        return _REPLY
    results = []
    for message in new_messages:
        if message.get("role") != "tool":
            break
        results.append(message)
    calls = [
        {
            "id": result.get("tool_call_id") or _CALL_ID,
            "type": "function",
            "function": {"name": result.get("name") or "tool", "arguments": {"q": _SENTINEL}},
        }
        for result in results
    ]
    return {**_REPLY, "tool_calls": calls}


def _for_template(message: Message) -> Message:
    """As templates expect it: the arguments of a call as an object, where OpenAI's API has them as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):  # not JSON: shown as the policy wrote it
                function["arguments"] = json.loads(function["arguments"] or "{}")
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _after_sentinel(text: str) -> str:
    count = text.count(_SENTINEL)
    if count != 1:
        raise TemplateError(
            f"chat template: it writes the text of an assistant message {count} times, expected once; new messages "
            "cannot be told from old ones. Use a template that keeps every assistant message"
        )
    return text.partition(_SENTINEL)[2]
