"""What a client's message history says about tokens: which IDs it carries, and whether its text was changed since.

Two histories are the same when a chat template would show the policy the same conversation: role, text and tool calls
of each turn count; how a client spells them (null or empty content, parts or a string, arguments as text or object,
reasoning beside the text, unknown fields) does not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from raygym.api.errors import ApiError
from raygym.types import Int32Array, Message

ID_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
_DIGEST_BYTES = 16
_MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Carried:
    """The token IDs on one assistant message of a history."""

    index: int
    """Of the message; what came after it is new."""
    token_ids: Int32Array
    """Prompt and generation of the call that made the message."""
    generated: int
    """How many of them, at the end, were generated."""


def carried_ids(messages: Sequence[Mapping[str, Any]], where: str = "messages") -> list[Carried]:
    """The messages that carry IDs, in order.

    Raises:
        ApiError: IDs that are not lists of token IDs, or a prompt without its generation.
    """
    found = []
    for index, message in enumerate(messages):
        prompt, generation = (message.get(field) for field in ID_FIELDS[:2])
        if prompt is None and generation is None:
            continue
        field = f"{where}[{index}]"
        if prompt is None or generation is None:
            missing = ID_FIELDS[0] if prompt is None else ID_FIELDS[1]
            raise ApiError(400, f"{field}: carries token IDs without {missing}; send both", f"{field}.{missing}")
        if message.get("role", "assistant") != "assistant":
            raise ApiError(400, f"{field}: only assistant messages carry token IDs", f"{field}.{ID_FIELDS[0]}")
        seen = _checked_ids(prompt, f"{field}.{ID_FIELDS[0]}")
        made = _checked_ids(generation, f"{field}.{ID_FIELDS[1]}")
        found.append(Carried(index, np.concatenate([seen, made]), len(made)))
    return found


def _checked_ids(value: Any, param: str) -> Int32Array:
    if isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_TOKEN_ID for item in value):
        return np.asarray(value, np.int32)
    if isinstance(value, list) and all(isinstance(item, str) and item.isdecimal() for item in value):
        # Some clients keep IDs as text, to be safe from lossy JSON numbers.
        return _checked_ids([int(item) for item in value], param)
    raise ApiError(400, f"{param}: expected a list of token IDs (integers of at least 0)", param)


def without_ids(message: Mapping[str, Any]) -> Message:
    """The message as an engine takes it."""
    return {key: value for key, value in message.items() if key not in ID_FIELDS}


def content_text(content: Any) -> str:
    """The text of a message's content: null, a string, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    return json.dumps(content, sort_keys=True, default=str)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, Mapping) and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    return json.dumps(part, sort_keys=True, default=str)


Turn = tuple[str, str, list[Any]]


@dataclass(frozen=True, slots=True)
class Digested:
    """A conversation with, for each message, a digest of everything up to and including it."""

    messages: Sequence[Mapping[str, Any]]
    digests: list[bytes]
    closed: bytes = b""
    """Digest of all but the last turn."""
    turn: Turn | None = None
    text_bytes: int = 0
    """Characters of all texts, near enough to what they take in memory."""

    def continued(self, messages: Sequence[Mapping[str, Any]]) -> Digested:
        """The digests of `messages`; what it shares with this conversation is compared, not digested anew."""
        shared = len(self.messages)
        same = shared <= len(messages) and messages[:shared] == self.messages
        known = self if same else _NOTHING
        found, closed, turn, size = list(known.digests), known.closed, known.turn, known.text_bytes
        for message in messages[len(found) :]:
            role, text, calls = _canonical(message)
            size += len(text) + sum(len(arguments) for _, arguments in calls)
            # Assistant messages in a row are one turn: clients split text and tool calls of one answer.
            if turn is not None and role == turn[0] == "assistant":
                turn = (role, turn[1] + text, turn[2] + calls)
            else:
                closed, turn = found[-1] if found else b"", (role, text, calls)
            found.append(_digest(closed, turn))
        return Digested(messages, found, closed, turn, size)


_NOTHING = Digested([], [])


def _digest(before: bytes, turn: Turn) -> bytes:
    role, text, calls = turn
    # Lengths first, so that no two conversations are spelled the same.
    said = f"{len(role)} {len(text := text.strip())} {role}{text}{json.dumps(calls) if calls else ''}"
    return hashlib.blake2b(before + said.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _canonical(message: Mapping[str, Any]) -> tuple[str, str, list[Any]]:
    role = str(message.get("role", "assistant"))
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        calls.append([str(function.get("name")), _canonical_arguments(function.get("arguments"))])
    return "system" if role == "developer" else role, content_text(message.get("content")), calls


def _canonical_arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # cut or malformed: the text itself
            arguments = json.loads(arguments or "{}")
    return json.dumps({} if arguments is None else arguments, sort_keys=True)


class KnownHistories:
    """Which conversation each sequence of token IDs was, for IDs that this server gave out. Bounded."""

    def __init__(self, capacity: int = 32_768) -> None:
        self._capacity = capacity
        self._turns: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()

    def remember(self, token_ids: Int32Array, messages: Sequence[Mapping[str, Any]]) -> None:
        """`token_ids` are the whole of `messages`, of which the last is the answer."""
        key = _ids_key(token_ids)
        self._turns[key] = tuple(_message_key(message) for message in messages)
        self._turns.move_to_end(key)
        while len(self._turns) > self._capacity:
            self._turns.popitem(last=False)

    def agrees(self, carried: Sequence[Carried], messages: Sequence[Mapping[str, Any]]) -> bool | None:
        """Whether the messages up to the last carrying one are still the conversation that its IDs are.

        IDs are the only truth of the messages that carry them: agents may parse or trim the text there. Every other
        message must say what it said, and IDs on earlier messages must begin the last ones.

        Args:
            carried: the IDs that the history carries, up to those in question.
            messages: the whole history.

        Returns:
            None when this server did not give these IDs out, so that only decoding them can tell.
        """
        last = carried[-1]
        if not contiguous(carried):
            return False
        known = self._turns.get(_ids_key(last.token_ids))
        if known is None:
            return None
        if len(known) != last.index + 1:
            return False
        own = {ids.index for ids in carried}
        return all(
            index in own or _message_key(message) == key
            for index, (message, key) in enumerate(zip(messages, known, strict=False))
        )


def contiguous(carried: Sequence[Carried]) -> bool:
    """Whether each message's IDs begin those of the next one that carries some."""
    return all(
        np.array_equal(before.token_ids, after.token_ids[: len(before.token_ids)])
        for before, after in itertools.pairwise(carried)
    )


def _message_key(message: Mapping[str, Any]) -> bytes:
    role, text, calls = _canonical(message)
    return _digest(b"", (role, text, calls))[:8]


def _ids_key(token_ids: Int32Array) -> bytes:
    return hashlib.blake2b(token_ids.astype(np.int32, copy=False).tobytes(), digest_size=_DIGEST_BYTES).digest()


def appears_in(messages: Sequence[Mapping[str, Any]], text: str, own: Collection[int] = ()) -> bool:
    """Whether each message's text and each call's name stand in `text`, in order; those at `own` are not looked for.

    For IDs that another server gave out, whose conversation is known only by decoding them. Templates may trim, and
    may write what is between; an edit of a message's text does not pass.
    """
    position = 0
    for index, message in enumerate(messages):
        if index in own:
            continue
        _, said, calls = _canonical(message)
        for piece in (said.strip(), *(name for name, _ in calls)):
            at = text.find(piece, position)
            if at < 0:
                return False
            position = at + len(piece)
    return True
