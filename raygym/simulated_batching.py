"""Continuous batching as vLLM does it, in simulated time: who runs, who waits, and when each generation is whole.

A step makes one token for every running request. Its time is linear in what it computes:

    step_s + request_s * requests + kv_token_s * (tokens in their KV cache) + prefill_token_s * (prompt tokens)

so throughput rises with the batch and then saturates. Nothing here reads a clock: the caller says what time it is.
Steps that do not differ in who takes part are one event, found by arithmetic and not by going through them, and what
a request has done is told from a count of steps: an event costs microseconds however many requests run.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from math import inf, nextafter, sqrt

import numpy as np

from raygym.batching_config import BatchingConfig
from raygym.kv_blocks import KvBlocks, prefix_hashes
from raygym.types import Int32Array


@dataclass(slots=True, eq=False)
class BatchedRequest:
    """One generation in the batch. Its tokens are known from the beginning; the batch says when they are made."""

    token_ids: Int32Array
    """The P tokens of the prompt and the N that will be generated."""
    prompt_tokens: int
    finished_s: float | None = None
    """When its last token was made."""
    changes: list[tuple[int, int]] = field(default_factory=list)
    """For each change of weights in its time: how many tokens were made before it, and the version after it."""

    _made: int = 0
    _since: int = 0
    """`_made` tokens were made when `_since` steps had been; while it decodes, each step makes one more."""
    _decodes: bool = False
    _to_compute: int = 0
    """Tokens without which it cannot decode: the prompt, and what was made before it was preempted."""
    _computed: int = 0
    _hashes: list[int] = field(default_factory=list)
    _shared: list[int] = field(default_factory=list)
    _was_admitted: bool = False
    _put_back: bool = False
    """New weights took it out of the batch, and it is not in again."""

    @property
    def length(self) -> int:
        """N."""
        return len(self.token_ids) - self.prompt_tokens


@dataclass(slots=True)
class _Steps:
    """One or more steps of the same requests, each `growth_s` longer than the one before."""

    start_s: float
    first_s: float
    growth_s: float
    number: int
    prefills: list[tuple[BatchedRequest, int]]
    done: int = 0
    begun: int = 1
    """Steps whose KV blocks have been taken: all that are done, and the one that runs."""

    def after_s(self, steps: int) -> float:
        return self.start_s + steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    @property
    def end_s(self) -> float:
        return self.after_s(self.number)

    def completed(self, time_s: float) -> int:
        """Steps that are whole at `time_s`, which lies before the end."""
        passed_s = max(0.0, time_s - self.start_s)
        slope = self.first_s - self.growth_s / 2
        root = sqrt(slope * slope + 2 * self.growth_s * passed_s)
        guess = min(self.number - 1, int(2 * passed_s / (slope + root)))
        # Rounding may have put it on the wrong side of a step's end.
        while guess > 0 and self.after_s(guess) > time_s:
            guess -= 1
        while guess + 1 < self.number and self.after_s(guess + 1) <= time_s:
            guess += 1
        return guess


class ContinuousBatching:
    """One engine's batch, queue and KV cache. Times are seconds of the caller's clock and never go back."""

    def __init__(self, config: BatchingConfig) -> None:
        """An idle engine with an empty cache."""
        self.config = config
        self.preemptions = 0
        """Requests that had to leave the batch for want of KV blocks, so far."""
        self.prefix_hit_tokens = 0
        """Prompt tokens that were found in the cache, so far."""
        self.prompt_tokens = 0
        """Prompt tokens of all requests that were admitted, so far."""
        self._kv = KvBlocks(config.kv_blocks)
        self._running: dict[BatchedRequest, None] = {}
        self._waiting: deque[BatchedRequest] = deque()
        self._partial: BatchedRequest | None = None
        self._finished: list[BatchedRequest] = []
        self._steps: _Steps | None = None
        self._step_count = 0
        self._decoding = 0
        self._context_tokens = 0
        # A decoding request needs a new block once in block_size steps; [k]: those that do when step_count % size == k.
        self._needing = [0] * config.block_size
        # (steps at which it is whole, tie-break, request, its _since); what has left meanwhile stays in here, stale.
        self._ends: list[tuple[int, int, BatchedRequest, int]] = []
        self._order = count()
        # The engine's own time stands still in pauses: it is the caller's less `_stood_s`.
        self._paused_at_s: float | None = None
        self._stood_s = 0.0

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def frozen(self) -> int:
        """Of those that wait, how many new weights took out of the batch: they say nothing of too many requests."""
        return sum(request._put_back for request in self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running requests hold, 0 to 1."""
        return self._kv.used / self._kv.blocks

    def submit(self, now_s: float, prompt_token_ids: Int32Array, generated_token_ids: Int32Array) -> BatchedRequest:
        """Queue a generation, at least one token for at least one.

        Raises:
            ValueError: it would never fit into the KV cache, or its prompt into a step.
        """
        token_ids = np.concatenate([prompt_token_ids, generated_token_ids]).astype(np.int32, copy=False)
        self._check_size(len(token_ids))
        self._catch_up(now_s)
        request = BatchedRequest(token_ids, len(prompt_token_ids))
        self._queue(request)
        could_join = not self._waiting and len(self._running) < self.config.max_num_seqs
        self._waiting.append(request)
        if could_join:
            self._end_after_current_step(now_s)
        self._plan_if_idle(now_s)
        return request

    def cancel(self, now_s: float, request: BatchedRequest) -> None:
        """Free its place and blocks at once; the step that it was part of takes its time all the same."""
        self._catch_up(now_s)
        if request.finished_s is not None:
            return
        self._end_after_current_step(now_s)
        if request in self._running:
            self._leave(request)
        else:
            self._waiting.remove(request)

    def pause(self, now_s: float) -> None:
        """Let time stand still for everything in flight."""
        if self._paused_at_s is None:
            self._catch_up(now_s)
            self._paused_at_s = now_s

    def resume(self, now_s: float) -> None:
        """Let time go on from where it stood."""
        if self._paused_at_s is not None:
            self._stood_s += now_s - self._paused_at_s
            self._paused_at_s = None
            self._plan_if_idle(now_s)

    def change_weights(self, now_s: float, version: int) -> None:
        """What is cached belongs to the old weights: drop it, also of running requests, which compute it again.

        They keep their order and the tokens that they have made. A step that was not done is lost.
        """
        self._catch_up(now_s)
        self._settle(now_s)
        for request in reversed(list(self._running)):
            self._leave(request, keep=False)
            self._waiting.appendleft(request)
            request._put_back = True
        self._steps = None
        for request in self._waiting:
            request.changes.append((request._made, version))
            self._queue(request)
        self._kv.forget()
        self._plan_if_idle(now_s)

    def made(self, now_s: float, request: BatchedRequest) -> int:
        """How many of its tokens there are by now."""
        self._catch_up(now_s)
        self._settle(now_s)
        return self._made(request)

    def advance(self, now_s: float) -> list[BatchedRequest]:
        """The requests that became whole since the last call, in the order in which they did."""
        self._catch_up(now_s)
        finished, self._finished = self._finished, []
        return finished

    def next_event_s(self) -> float | None:
        """When to `advance` next; None while nothing happens by itself. Every other call may change it."""
        if self._finished:
            return self._finished[0].finished_s
        if self._steps is None or self._paused_at_s is not None:
            return None
        return self._caller_s(self._steps.end_s)

    def _engine_s(self, now_s: float) -> float:
        return (now_s if self._paused_at_s is None else self._paused_at_s) - self._stood_s

    def _caller_s(self, time_s: float) -> float:
        now_s = time_s + self._stood_s
        # Rounded down, it would be a moment before that engine's time, and who waited for it would wait again.
        while now_s - self._stood_s < time_s:
            now_s = nextafter(now_s, inf)
        return now_s

    def _check_size(self, tokens: int) -> None:
        cfg = self.config
        # The last token is never computed.
        if tokens - 1 > cfg.kv_blocks * cfg.block_size:
            raise ValueError(
                f"a prompt and generation of {tokens} tokens do not fit into a KV cache of {cfg.kv_blocks} blocks "
                f"of {cfg.block_size}; raise policy.simulated.batching.kv_blocks"
            )
        if not cfg.chunked_prefill and tokens - 1 > cfg.max_num_batched_tokens:
            raise ValueError(
                f"a prompt and generation of {tokens} tokens may have to be computed in one step of at most "
                f"{cfg.max_num_batched_tokens}; raise policy.simulated.batching.max_num_batched_tokens, or set "
                "chunked_prefill"
            )

    def _queue(self, request: BatchedRequest) -> None:
        """What it needs to compute when it is admitted, and how that is known to the cache."""
        request._to_compute, request._computed = request.prompt_tokens + request._made, 0
        if self.config.prefix_caching:
            self._name_up_to(request, request._to_compute)

    def _name_up_to(self, request: BatchedRequest, tokens: int) -> None:
        if len(request._hashes) < tokens // self.config.block_size:
            request._hashes = prefix_hashes(request.token_ids[:tokens], self.config.block_size, request._hashes)

    def _catch_up(self, now_s: float) -> None:
        time_s = self._engine_s(now_s)
        while self._paused_at_s is None and self._steps is not None and self._steps.end_s <= time_s:
            self._end_steps(self._steps)

    def _settle(self, now_s: float) -> None:
        """Count the steps that are whole."""
        if self._steps is not None:
            self._count(self._steps, self._steps.completed(self._engine_s(now_s)))

    def _count(self, steps: _Steps, done: int) -> None:
        begun = min(done + 1, steps.number)
        base = self._step_count - steps.done
        whole, rest = divmod(begun - steps.begun, self.config.block_size)
        needed = whole * self._decoding + sum(
            self._needing[(base + step) % self.config.block_size] for step in range(begun - rest, begun)
        )
        if needed:
            self._kv.take(needed)
        self._step_count += done - steps.done
        self._context_tokens += self._decoding * (done - steps.done)
        steps.done, steps.begun = done, begun

    def _end_after_current_step(self, now_s: float) -> None:
        """Someone came or went: the steps after the running one are other ones."""
        if self._steps is not None:
            self._settle(now_s)
            self._steps.number = self._steps.begun

    def _end_steps(self, steps: _Steps) -> None:
        self._count(steps, steps.number)
        self._steps = self._partial = None
        for request, tokens in steps.prefills:
            if request not in self._running:
                continue  # cancelled meanwhile
            request._computed += tokens
            if request._computed == request._to_compute:
                self._begin_decoding(request, steps.end_s)
            else:
                self._partial = request
        while self._ends and self._ends[0][0] <= self._step_count:
            _, _, request, since = heapq.heappop(self._ends)
            if request._decodes and request._since == since:
                self._finish(request, steps.end_s)
        self._plan(steps.end_s)

    def _begin_decoding(self, request: BatchedRequest, time_s: float) -> None:
        request._made += 1
        if request._made == request.length:
            self._finish(request, time_s)
            return
        request._decodes, request._since = True, self._step_count
        tokens = request.prompt_tokens + request._made
        self._decoding += 1
        self._context_tokens += tokens
        self._needing[self._phase(request)] += 1
        end = self._step_count + request.length - request._made
        heapq.heappush(self._ends, (end, next(self._order), request, request._since))

    def _phase(self, request: BatchedRequest) -> int:
        # A step computes the token before the one that it makes: a new block when that is the first one of a block.
        return (request._since + 1 - request.prompt_tokens - request._made) % self.config.block_size

    def _made(self, request: BatchedRequest) -> int:
        return request._made + (self._step_count - request._since if request._decodes else 0)

    def _finish(self, request: BatchedRequest, time_s: float) -> None:
        request.finished_s = self._caller_s(time_s)
        self._leave(request)
        self._finished.append(request)

    def _leave(self, request: BatchedRequest, keep: bool = True) -> None:
        """Take it out of the batch and release its blocks; `keep` their content."""
        size = self.config.block_size
        made = self._made(request)
        if request._decodes:
            self._needing[self._phase(request)] -= 1
            self._decoding -= 1
            self._context_tokens -= request.prompt_tokens + made
            request._decodes = False
            # The last token that was made is computed by the step after it, which may be running.
            computed = request.prompt_tokens + made - 1
            held = computed + (self._steps is not None)
        else:
            held = request._to_compute
            computed = held if request.finished_s is not None else 0
        if keep and self.config.prefix_caching and computed:
            self._name_up_to(request, computed)
            request._shared += self._kv.name(request._hashes[len(request._shared) : computed // size])
        self._kv.release(request._shared, -(-held // size) - len(request._shared))
        request._made, request._shared = made, []
        if self._partial is request:
            self._partial = None
        del self._running[request]

    def _plan_if_idle(self, now_s: float) -> None:
        if self._steps is None and self._paused_at_s is None:
            self._plan(self._engine_s(now_s))

    def _plan(self, time_s: float) -> None:
        """Decide who takes part in the next step, and for how many steps nothing of that changes."""
        cfg = self.config
        preempted = self._preempt_until_decoding_fits()
        self._kv.take(self._needing[self._step_count % cfg.block_size])
        prefills = self._choose_prefills(admit=not preempted)
        if not self._running:
            return
        requests = self._decoding + len(prefills)
        new_tokens = sum(tokens for _, tokens in prefills)
        kv_tokens = self._context_tokens + sum(request._computed + tokens for request, tokens in prefills)
        first_s = cfg.step_s + cfg.request_s * requests + cfg.kv_token_s * kv_tokens + cfg.prefill_token_s * new_tokens
        number = 1 if prefills or preempted else self._steps_until_change()
        self._steps = _Steps(time_s, first_s, cfg.kv_token_s * self._decoding, number, prefills)

    def _preempt_until_decoding_fits(self) -> bool:
        preempted = False
        while self._needing[self._step_count % self.config.block_size] > self._kv.available:
            youngest = next(reversed(self._running))
            self._leave(youngest)
            self._queue(youngest)
            self._waiting.appendleft(youngest)
            self.preemptions += 1
            preempted = True
        return preempted

    def _choose_prefills(self, admit: bool) -> list[tuple[BatchedRequest, int]]:
        cfg = self.config
        budget = cfg.max_num_batched_tokens - self._decoding
        prefills: list[tuple[BatchedRequest, int]] = []
        if self._partial is not None:
            budget -= self._compute(self._partial, budget, prefills)
        while admit and budget and self._waiting and len(self._running) < cfg.max_num_seqs:
            request = self._waiting[0]
            # The last token has to be computed, or nothing would say what comes after it.
            hits = self._kv.known(request._hashes[: (request._to_compute - 1) // cfg.block_size])
            missing = -(-request._to_compute // cfg.block_size) - hits
            found = request._hashes[:hits]
            left = request._to_compute - hits * cfg.block_size
            if missing + self._kv.cost(found) > self._kv.available or (not cfg.chunked_prefill and left > budget):
                break
            self._waiting.popleft()
            request._put_back = False
            self._running[request] = None
            self._kv.share(found)
            self._kv.take(missing)
            request._shared, request._computed = found, hits * cfg.block_size
            if not request._was_admitted:
                request._was_admitted = True
                self.prompt_tokens += request.prompt_tokens
                self.prefix_hit_tokens += request._computed
            budget -= self._compute(request, budget, prefills)
        return prefills

    def _compute(self, request: BatchedRequest, budget: int, prefills: list[tuple[BatchedRequest, int]]) -> int:
        tokens = min(budget, request._to_compute - request._computed)
        full = (request._computed + tokens) // self.config.block_size
        # Others may share a block from the step on that computes it.
        request._shared += self._kv.name(request._hashes[request._computed // self.config.block_size : full])
        prefills.append((request, tokens))
        return tokens

    def _steps_until_change(self) -> int:
        """Steps until a request is whole or the KV blocks are used up; only decoding requests are running."""
        while not (self._ends[0][2]._decodes and self._ends[0][2]._since == self._ends[0][3]):
            heapq.heappop(self._ends)
        most = self._ends[0][0] - self._step_count
        size = self.config.block_size
        rounds, left = divmod(self._kv.available, self._decoding)
        steps = 1 + rounds * size
        while steps < most:
            left -= self._needing[(self._step_count + steps) % size]
            if left < 0:
                break
            steps += 1
        return min(steps, most)
