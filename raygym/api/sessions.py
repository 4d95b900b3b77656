"""Sessions: the server's record of what an agent that knows nothing of tokens made the policy see and say.

A session is a tree of calls. A call whose history continues a recorded one is spliced onto that call's tokens; one
whose history goes another way (parallel branches, edited messages) branches off where they part, or starts anew. At the
end every leaf is a segment, and each generated token is trained in exactly one of them.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raygym.api.errors import ApiError
from raygym.api.history import Digested
from raygym.types import Float32Array, Generation, Int32Array

_BYTES_PER_TOKEN = 12  # ID, logprob, version
_REMEMBERED_ENDS = 10_000


@dataclass(frozen=True, slots=True)
class CallDetails:
    """What a call was, beside its tokens."""

    kind: str
    """`chat`, `responses` or `completion`."""
    message: dict[str, Any]
    """The answer, as the client got it."""
    sampling: dict[str, Any] = field(default_factory=dict)
    constrained: bool = False
    """A grammar cut the distribution: no learner can reproduce the logprobs, so the tokens are not trained."""


@dataclass(slots=True)
class RecordedCall:
    """One generation of a session. Only what the parent's tokens lack is kept."""

    parent: RecordedCall | None
    prompt_suffix: Int32Array
    """What the prompt adds to the parent's tokens; the whole prompt without a parent."""
    generation: Generation
    details: CallDetails
    children: int = 0
    _whole: Int32Array | None = None

    @property
    def length(self) -> int:
        """Tokens from the root to the end of this generation."""
        before = self.parent.length if self.parent else 0
        return before + len(self.prompt_suffix) + len(self.generation.token_ids)

    def path(self) -> list[RecordedCall]:
        """From the root to this call."""
        calls: list[RecordedCall] = []
        call: RecordedCall | None = self
        while call is not None:
            calls.append(call)
            call = call.parent
        return calls[::-1]

    def token_ids(self) -> Int32Array:
        """All tokens from the root to the end of this generation."""
        if self._whole is not None:
            return self._whole
        pieces: list[Int32Array] = []
        for call in self.path():
            pieces += [call.prompt_suffix, call.generation.token_ids]
        return np.concatenate(pieces)

    def keep_whole(self, token_ids: Int32Array) -> None:
        """Have all tokens at hand while this call is a leaf, as the next turn will ask for them."""
        self._whole = token_ids
        if self.parent is not None:
            self.parent._whole = None


@dataclass(slots=True)
class Session:
    """What one session has recorded."""

    session_id: str
    profile: str
    """Which of the run's sampling profiles it uses."""
    metadata: dict[str, Any]
    used_at: float
    calls: list[RecordedCall] = field(default_factory=list)
    forks: int = 0
    _recorded_bytes: int = 0
    _by_digest: dict[bytes, RecordedCall] = field(default_factory=dict)
    _digested: Digested = field(default_factory=lambda: Digested([], []))
    """The last history that was looked up: the next one mostly continues it."""

    def longest_prefix(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, RecordedCall] | None:
        """The recorded call that the history continues furthest: (messages covered, call)."""
        self._digested = self._digested.continued(messages)
        digests = self._digested.digests
        for index in range(len(digests) - 1, -1, -1):
            if (call := self._by_digest.get(digests[index])) is not None:
                return index + 1, call
        return None

    def longest_token_prefix(self, token_ids: Int32Array) -> RecordedCall | None:
        """The longest recorded call whose tokens begin `token_ids`."""
        found: RecordedCall | None = None
        for call in self.calls:
            if (found is None or call.length > found.length) and call.length <= len(token_ids):
                own = call.token_ids()
                if np.array_equal(own, token_ids[: len(own)]):
                    found = call
        return found

    def record(
        self,
        parent: RecordedCall | None,
        prompt: Int32Array,
        generation: Generation,
        details: CallDetails,
        messages: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """Add a finished call whose prompt begins with the parent's tokens; `messages` end with the answer."""
        known = parent.length if parent else 0
        call = RecordedCall(parent, prompt[known:].copy(), generation, details)
        if parent is not None:
            self.forks += parent.children > 0
            parent.children += 1
        elif self.calls:
            self.forks += 1
        self.calls.append(call)
        tokens = len(call.prompt_suffix) * 4 + len(generation.token_ids) * _BYTES_PER_TOKEN
        self._recorded_bytes += tokens + len(str(details.message))
        call.keep_whole(np.concatenate([prompt, generation.token_ids]))
        if messages is not None:
            self._by_digest[self._digested.continued(messages).digests[-1]] = call

    @property
    def nbytes(self) -> int:
        """Roughly what the record takes: tokens, answers, and the last history."""
        return self._recorded_bytes + self._digested.text_bytes

    def segments(self) -> list[dict[str, Any]]:
        """One segment a leaf, in the order in which the leaves were made: JSON-ready lists of one length each."""
        trained: set[int] = set()
        return [self._segment(call, trained) for call in self.calls if call.children == 0]

    def _segment(self, leaf: RecordedCall, trained: set[int]) -> dict[str, Any]:
        ids: list[Int32Array] = []
        mask: list[np.ndarray[Any, Any]] = []
        logprobs: list[Float32Array] = []
        versions: list[Int32Array] = []
        calls = []
        at = 0
        for call in leaf.path():
            seen, made = len(call.prompt_suffix), len(call.generation.token_ids)
            # A generation that several branches share is trained in the first of them.
            trains = id(call) not in trained and not call.details.constrained
            trained.add(id(call))
            ids += [call.prompt_suffix, call.generation.token_ids]
            finite = np.isfinite(call.generation.logprobs)
            mask += [np.zeros(seen, np.bool_), finite & trains]
            logprobs += [np.zeros(seen, np.float32), np.where(finite, call.generation.logprobs, 0).astype(np.float32)]
            versions += [np.full(seen, -1, np.int32), call.generation.weight_versions]
            calls.append(
                {
                    "kind": call.details.kind,
                    "start": at + seen,
                    "end": at + seen + made,
                    "finish_reason": call.generation.finish_reason,
                    "constrained": call.details.constrained,
                    "sampling": call.details.sampling,
                    "message": call.details.message,
                }
            )
            at += seen + made
        return {
            "token_ids": np.concatenate(ids).tolist(),
            "loss_mask": np.concatenate(mask).tolist(),
            "logprobs": np.concatenate(logprobs).tolist(),
            "weight_versions": np.concatenate(versions).tolist(),
            "calls": calls,
        }


class SessionStore:
    """The sessions of one replica: bounded in number and in memory, each with a time to live."""

    def __init__(
        self,
        owner: str,
        *,
        ttl_s: float = 3600.0,
        max_sessions: int = 10_000,
        max_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty store.

        Args:
            owner: names this replica; part of every ID, so that a session finds its record or learns that it is lost.
            ttl_s: seconds without a call after which a session is dropped.
            max_sessions: open sessions at once.
            max_bytes: of recorded tokens, over all sessions.
            clock: seconds, monotonic.
        """
        self.owner = owner
        self.ttl_s = ttl_s
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._counted: dict[str, int] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def create(self, profile: str, metadata: dict[str, Any]) -> Session:
        """Open a session.

        Raises:
            ApiError: 429, too many are open or too much is recorded.
        """
        self.expire()
        if len(self._sessions) >= self._max_sessions:
            message = f"{self._max_sessions} sessions are open on this replica; close some"
            raise ApiError(429, message, code="too_many_sessions")
        self._check_room()
        session = Session(f"{self.owner}.{secrets.token_urlsafe(24)}", profile, metadata, self._clock())
        self._sessions[session.session_id] = session
        return session

    def get(self, session_id: str) -> Session:
        """An open session, used now.

        Raises:
            ApiError: 404 for an ID that never was one, 410 for one that expired, was closed, or whose replica is gone.
        """
        self.expire()
        session = self._sessions.get(session_id)
        if session is None:
            raise self._missing(session_id)
        session.used_at = self._clock()
        self._sessions.move_to_end(session_id)
        return session

    def close(self, session_id: str) -> Session:
        """End a session and forget it. What it recorded is in the returned object only."""
        session = self.get(session_id)
        self._end(session_id, "closed")
        return session

    def record(self, session: Session, *arguments: Any) -> None:
        """`Session.record`, counted."""
        session.record(*arguments)
        if session.session_id in self._sessions:
            self.nbytes += session.nbytes - self._counted.get(session.session_id, 0)
            self._counted[session.session_id] = session.nbytes

    def check_room(self) -> None:
        """Raises ApiError (429) when no more tokens may be recorded."""
        self.expire()
        self._check_room()

    def expire(self) -> None:
        """Drop sessions that were not used for their time to live."""
        while self._sessions:
            session_id, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used_at < self.ttl_s:
                return
            self._end(session_id, f"not used for {self.ttl_s:.0f} s")

    def _end(self, session_id: str, why: str) -> None:
        del self._sessions[session_id]
        self.nbytes -= self._counted.pop(session_id, 0)
        self._ended[session_id] = why
        while len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    def _check_room(self) -> None:
        if self.nbytes >= self._max_bytes:
            message = f"sessions hold {self.nbytes >> 20} MiB of tokens on this replica; close some"
            raise ApiError(429, message, code="sessions_full")

    def _missing(self, session_id: str) -> ApiError:
        owner, dot, _ = session_id.partition(".")
        if session_id in self._ended:
            problem, status, code = f"it has ended ({self._ended[session_id]})", 410, "session_ended"
        elif dot and owner != self.owner:
            problem, status, code = "the replica that recorded it is gone, and its tokens with it", 410, "session_lost"
        else:
            problem, status, code = "there is none of this ID", 404, "session_not_found"
        return ApiError(status, f"session {session_id}: {problem}; open one with POST /sessions", code=code)
