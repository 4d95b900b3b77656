"""One HTTP call that generates: the exact tokens of its prompt on the way in, of its answer on the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from raygym.api.history import Carried, KnownHistories, appears_in
from raygym.api.sessions import CallDetails, RecordedCall, Session, SessionStore
from raygym.chat import ChatRenderer
from raygym.types import Float32Array, Generation, Int32Array, Message


class HistoryOutcome(StrEnum):
    """How the prompt of a call came about."""

    FRESH = "fresh"
    """No tokens were known of the history: it was rendered."""
    EXTENDED = "extended"
    """The known tokens, unchanged, and the rendering of what came after them."""
    FORKED = "forked"
    """The client changed its history since: what still agrees was kept, or all was rendered. A new segment."""


@dataclass(slots=True)
class Call:
    """What the front knows of a call, and what the engine adds."""

    kind: str
    """`chat`, `responses`, `completion` or `tokenize`."""
    known: KnownHistories
    wants_ids: bool = False
    carried: Sequence[Carried] = ()
    carried_turns: Sequence[tuple[int, Carried]] = ()
    """For histories that the engine converts: (how many assistant turns end with the carrying one, its IDs)."""
    session: Session | None = None
    store: SessionStore | None = None
    messages: list[Message] | None = None
    """The conversation as a chat, once known."""
    outcome: HistoryOutcome = HistoryOutcome.FRESH
    prompt: Int32Array | None = None
    parent: RecordedCall | None = None
    generation: Generation | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """How the engine sampled."""
    constrained: bool = False
    """A grammar (forced tool, JSON schema) cut the distribution: the logprobs are not the policy's own."""
    reached_engine: bool = False
    """The request was understood; what fails from here on is not the client's mistake."""
    _chunks: list[Generation] = field(default_factory=list)

    @property
    def keeps_tokens(self) -> bool:
        """Whether somebody will want the exact tokens of this call."""
        return self.wants_ids or self.session is not None

    def chat_prompt(
        self, messages: list[Message], renderer: Callable[[], ChatRenderer], fresh: Callable[[], Int32Array]
    ) -> Int32Array:
        """The prompt of a conversation: known tokens as they are, and only what came after them rendered.

        Args:
            messages: the conversation.
            renderer: for the template, tools and roles of this call; called only when there are known tokens.
            fresh: renders the whole conversation.

        Raises:
            TemplateError: the template cannot keep history's tokens.
        """
        self.messages = messages
        base = self._known_tokens(messages, renderer)
        if base is None:
            self.prompt = fresh()
        else:
            token_ids, covered = base
            self.prompt = renderer().extend(token_ids, messages[covered:])
        return self.prompt

    def _known_tokens(
        self, messages: list[Message], renderer: Callable[[], ChatRenderer]
    ) -> tuple[Int32Array, int] | None:
        carried = [*self.carried, *_at_turns(self.carried_turns, messages)]
        if self.session is not None and self.session.calls:
            found = self.session.longest_prefix(messages)
            if found is not None:
                covered, self.parent = found
                self.outcome = HistoryOutcome.FORKED if self.parent.children else HistoryOutcome.EXTENDED
                return self.parent.token_ids(), covered
            self.outcome = HistoryOutcome.FORKED
        for count in range(len(carried), 0, -1):
            ids = carried[count - 1]
            agrees = self.known.agrees(carried[:count], messages)
            if agrees is None:
                text = renderer().decode(ids.token_ids, special=True)
                agrees = appears_in(messages[: ids.index], text, {other.index for other in carried})
            if agrees:
                if self.outcome is HistoryOutcome.FRESH:
                    self.outcome = HistoryOutcome.EXTENDED
                return ids.token_ids, ids.index + 1
            self.outcome = HistoryOutcome.FORKED
        return None

    def text_prompt(self, token_ids: Int32Array) -> None:
        """The engine's prompt of a plain completion."""
        self.prompt = token_ids
        if self.session is not None and self.session.calls:
            self.parent = self.session.longest_token_prefix(token_ids)
            forked = self.parent is None or self.parent.children > 0
            self.outcome = HistoryOutcome.FORKED if forked else HistoryOutcome.EXTENDED

    def add(self, generation: Generation) -> None:
        """A piece of the answer, as the engine streams it."""
        self._chunks.append(generation)

    def replace(self, generation: Generation) -> None:
        """The whole answer so far."""
        self._chunks = [generation]

    def set_versions(self, weight_versions: Int32Array) -> None:
        """The weight version of each of the N tokens so far, where the engine told it only at the end."""
        start = 0
        for index, chunk in enumerate(self._chunks):
            end = start + len(chunk.token_ids)
            versions = weight_versions[start:end]
            self._chunks[index] = Generation(chunk.token_ids, chunk.logprobs, versions, chunk.finish_reason)
            start = end

    def finish(self, message: dict[str, Any]) -> Generation | None:
        """The answer is complete and this is what the client gets: remember it. None when no tokens are known."""
        if self.prompt is None or not self._chunks:
            return None
        generation = self.generation = _joined(self._chunks)
        conversation = None
        if self.messages is not None:
            conversation = [*self.messages, message]
            if self.wants_ids:  # IDs that nobody was given cannot come back
                self.known.remember(np.concatenate([self.prompt, generation.token_ids]), conversation)
        if self.session is not None and self.store is not None:
            how = CallDetails(self.kind, message, self.sampling, self.constrained)
            self.store.record(self.session, self.parent, self.prompt, generation, how, conversation)
        return generation

    def id_fields(self) -> dict[str, Any]:
        """What a message of the answer carries."""
        assert self.prompt is not None and self.generation is not None
        return {
            "prompt_token_ids": self.prompt.tolist(),
            "generation_token_ids": self.generation.token_ids.tolist(),
            "generation_log_probs": _json_floats(self.generation.logprobs),
        }


current_call: ContextVar[Call | None] = ContextVar("raygym_call", default=None)
"""The call that the running code serves; engines look here."""


def _at_turns(carried: Sequence[tuple[int, Carried]], messages: Sequence[Message]) -> list[Carried]:
    ends = [
        index
        for index, message in enumerate(messages)
        if message.get("role") == "assistant"
        and (index + 1 == len(messages) or messages[index + 1].get("role") != "assistant")
    ]
    return [Carried(ends[turn - 1], ids.token_ids, ids.generated) for turn, ids in carried if 0 < turn <= len(ends)]


def _joined(chunks: Sequence[Generation]) -> Generation:
    if len(chunks) == 1:
        return chunks[0]
    return Generation(
        np.concatenate([chunk.token_ids for chunk in chunks]),
        np.concatenate([chunk.logprobs for chunk in chunks]),
        np.concatenate([chunk.weight_versions for chunk in chunks]),
        chunks[-1].finish_reason,
    )


def _json_floats(values: Float32Array) -> list[float | None]:
    # JSON has no NaN; a client that meets null knows that there is no logprob.
    return [float(value) if np.isfinite(value) else None for value in values]
