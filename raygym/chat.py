"""Chat messages to token IDs and back, without ever tokenizing history twice.

The rule: the policy's own tokens are kept as they were sampled; only messages that came after them are rendered. To
render them alone, a fixed base conversation that ends in an assistant message is rendered together with them, and what
follows the assistant's text is the suffix: the end of its turn, the new messages, and the next generation prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np

from raygym.types import Int32Array, Message

_SENTINEL = "raygymsentinel"
_BASE: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SENTINEL}]


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
    ) -> None:
        """Take the tokenizer's chat template, after verifying it.

        Args:
            tokenizer: its chat template is used.
            tools: OpenAI tool schemas shown to the policy.
            roles: what environments of the run use; `tool` is added where there are tools.

        Raises:
            TemplateError: the template cannot keep history's tokens; the text says how it breaks the rule.
        """
        self._tokenizer = tokenizer
        self._tools = list(tools)
        self._roles = set(roles) | ({"tool"} if tools else set())
        self._special = frozenset(tokenizer.all_special_ids)
        self._closing = self._tokens(_after_sentinel(self._render(_BASE, generation=False)))
        if not self._closing or self._closing[0] not in self._special:
            raise TemplateError(
                "chat template: an assistant message is not followed directly by a special end-of-turn token, but by "
                f"{tokenizer.decode(self._closing)!r}; a cut generation could not be closed. Use a template that ends "
                "every turn with a special token"
            )
        self.end_of_turn_id: int = self._closing[0]
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

    def decode(self, token_ids: Int32Array) -> str:
        """The assistant's text, without special tokens such as the end of turn."""
        return str(
            self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

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
        opening: list[Message] = [{"role": "user", "content": "Hello"}]
        if "system" in self._roles:
            opening.insert(0, {"role": "system", "content": "Be brief."})
        reply: Message = {"role": "assistant", "content": _SENTINEL}
        replies: list[Message] = [{"role": "user", "content": "Go on"}]
        if "tool" in self._roles:
            replies.append({"role": "tool", "content": "done", "tool_call_id": "call00000", "name": "tool"})
        prompt = self.render_initial(opening)
        for new in replies:
            # From the first generation on only the suffix is rendered; what precedes it may be rewritten by a template
            # that strips reasoning, but the suffix must not depend on how long the history is.
            short = self._suffix([new])
            whole = self._render([*opening, reply, new], generation=True)
            if self._tokens(_after_sentinel(whole)) != short:
                raise TemplateError(
                    f"chat template: what it writes for a new {new['role']} message depends on the messages before it, "
                    "so history would have to be rendered again; use a template that renders each message on its own"
                )
            generated = np.asarray([*self._tokens(_SENTINEL), self.end_of_turn_id], np.int32)
            extended = self.extend(np.concatenate([prompt, generated]), [new])
            assert np.array_equal(extended[: len(prompt)], prompt)

    def _suffix(self, new_messages: Sequence[Message]) -> list[int]:
        suffix = self._tokens(_after_sentinel(self._render([*_BASE, *new_messages], generation=True)))
        if not suffix or suffix[0] != self.end_of_turn_id:
            role = new_messages[0]["role"] if new_messages else "no"
            found, expected = self._tokenizer.decode(suffix[:4]), self._tokenizer.decode(self._closing)
            raise TemplateError(
                f"chat template: a {role} message after an assistant's changes how the assistant's turn ends (it "
                f"is followed by {found!r}, else by {expected!r})"
            )
        return suffix

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=self._tools or None, tokenize=False, add_generation_prompt=generation
                )
            )
        except Exception as error:  # Jinja, and whatever a template's own functions raise
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"chat template: it cannot render a conversation of the roles {roles}: {type(error).__name__}: {error}"
            ) from error

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _after_sentinel(text: str) -> str:
    count = text.count(_SENTINEL)
    if count != 1:
        raise TemplateError(
            f"chat template: it writes the text of an assistant message {count} times, expected once; new messages "
            "cannot be told from old ones. Use a template that keeps every assistant message"
        )
    return text.partition(_SENTINEL)[2]
