"""Continuous batching in simulated time: hand-computed cases on an exact clock, and what holds for every load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiers import LONG

from raygym.batching_config import BatchingConfig
from raygym.kv_blocks import KvBlocks, prefix_hashes
from raygym.simulated_batching import BatchedRequest, ContinuousBatching


def batching(**keys: Any) -> ContinuousBatching:
    """Steps of 1 s, and what is told."""
    return ContinuousBatching(BatchingConfig(**{"step_s": 1.0, "kv_blocks": 1000, "block_size": 4, **keys}))


def tokens(count: int, first: int = 0) -> Any:
    return np.arange(first, first + count, dtype=np.int32)


def submit(batch: ContinuousBatching, now_s: float, prompt: int, length: int, first: int = 0) -> BatchedRequest:
    """A prompt and an answer of so many tokens; another `first` shares nothing with it."""
    return batch.submit(now_s, tokens(prompt, first), tokens(length, first + prompt))


def finish(batch: ContinuousBatching) -> dict[BatchedRequest, float]:
    """Go from event to event until nothing happens any more; when each request was whole."""
    ends = {}
    while (due := batch.next_event_s()) is not None:
        for request in batch.advance(due):
            ends[request] = request.finished_s
    return ends


class TestTime:
    def test_one_request(self) -> None:
        batch = batching(request_s=0.5, kv_token_s=0.25, prefill_token_s=0.125)
        request = submit(batch, 10.0, prompt=4, length=3)
        # 1 + 0.5 + 4 * (0.25 + 0.125), then steps over a context of 5 and 6 tokens.
        assert finish(batch) == {request: 10 + 3.0 + (1.5 + 1.25) + (1.5 + 1.5)}

    def test_an_arrival_joins_at_the_next_step(self) -> None:
        batch = batching(request_s=0.5)
        first = submit(batch, 0.0, prompt=4, length=4)
        # The first one's steps end at 1.5, 3.0, ...; from 3.0 on two take part.
        second = submit(batch, 2.0, prompt=4, length=2, first=50)
        assert finish(batch) == {first: 3.0 + 2 + 2, second: 3.0 + 2 + 2}

    def test_a_prompt_is_computed_in_chunks_beside_those_that_generate(self) -> None:
        batch = batching(max_num_batched_tokens=6, max_num_seqs=4, prefill_token_s=1.0)
        first = submit(batch, 0.0, prompt=2, length=9)
        # From 3.0 on a step has room for five prompt tokens: 5, 5, 1.
        second = submit(batch, 2.5, prompt=11, length=1, first=50)
        ends = finish(batch)
        assert ends[second] == 3.0 + 6 + 6 + 2
        assert ends[first] == 3.0 + 6 + 6 + 2 + 5

    def test_without_chunks_a_prompt_waits_for_room_in_a_step(self) -> None:
        batch = batching(max_num_batched_tokens=8, max_num_seqs=4, chunked_prefill=False)
        first, second = submit(batch, 0.0, prompt=2, length=3), submit(batch, 0.0, prompt=8, length=1, first=50)
        # Eight tokens fit only once the first one is gone, at 3.0.
        assert finish(batch) == {first: 3.0, second: 4.0}

    def test_no_more_than_max_num_seqs_run(self) -> None:
        batch = batching(max_num_seqs=2)
        requests = [submit(batch, 0.0, prompt=1, length=3, first=100 * n) for n in range(3)]
        assert (batch.running, batch.waiting) == (1, 2)
        ends = finish(batch)
        # The second joins at 1.0; the third takes the first one's place at 3.0.
        assert [ends[request] for request in requests] == [3.0, 4.0, 6.0]


class TestKvCache:
    def test_the_youngest_is_preempted_and_computed_again(self) -> None:
        batch = batching(kv_blocks=4, prefix_caching=False, prefill_token_s=0.5)
        first = submit(batch, 0.0, prompt=7, length=5)
        second = submit(batch, 0.5, prompt=4, length=4, first=50)
        # 0.0: prompt of 7, 4.5 s. 4.5: second joins; 1 + 2 s; all: 2 + 1 blocks, then each begins a block:
        # first needs its third at 5 - 7 + 7 = token 9, second its second at token 5.
        batch.advance(4.5)
        assert batch.kv_usage == 3 / 4
        batch.advance(7.5)  # first has made 2 and needs a block for token 9, second for token 5: one is free
        assert (batch.running, batch.waiting, batch.preemptions, batch.kv_usage) == (1, 1, 1, 3 / 4)
        assert (batch.made(7.5, first), batch.made(7.5, second)) == (2, 1)
        ends = finish(batch)
        # First: tokens 3, 4, 5 in three steps. Second: its 5 tokens need 2 blocks, free then; 2 more.
        assert ends[first] == 7.5 + 3
        assert ends[second] == 10.5 + (1 + 2.5) + 2
        assert batch.kv_usage == 0

    def test_the_queue_waits_for_blocks_in_order(self) -> None:
        batch = batching(kv_blocks=4)
        first = submit(batch, 0.0, prompt=8, length=2)
        large = submit(batch, 0.0, prompt=12, length=1, first=50)
        small = submit(batch, 0.0, prompt=1, length=1, first=90)
        # The small one would fit beside the first, but came after the large one.
        assert finish(batch) == {first: 2.0, large: 3.0, small: 3.0}

    def test_a_known_prefix_is_not_computed(self) -> None:
        batch = batching(prefill_token_s=1.0)
        submit(batch, 0.0, prompt=9, length=4)
        finish(batch)
        # Of 13 tokens the last was not computed, so three blocks are known; one more token of the prompt is not.
        again = submit(batch, 100.0, prompt=13, length=1)
        assert finish(batch) == {again: 100.0 + 1 + 1}
        assert (batch.prefix_hit_tokens, batch.prompt_tokens) == (12, 22)

    def test_a_prompt_that_is_known_whole_computes_its_last_block(self) -> None:
        batch = batching(prefill_token_s=1.0)
        submit(batch, 0.0, prompt=8, length=1)
        finish(batch)
        again = submit(batch, 100.0, prompt=8, length=1)
        assert finish(batch) == {again: 100.0 + 1 + 4}

    def test_a_group_shares_its_prompt_at_once(self) -> None:
        batch = batching(prefill_token_s=1.0)
        prompt = tokens(9)
        first = batch.submit(0.0, prompt, tokens(3, 50))
        others = [batch.submit(0.0, prompt, tokens(3, 60 + 10 * n)) for n in range(3)]
        batch.advance(10.0)
        assert batch.kv_usage == (3 + 3) / 1000, "two blocks for all of them, and each one's own"
        ends = finish(batch)
        assert ends[first] == 10.0 + 4 + 1
        assert {ends[other] for other in others} == {10.0 + 4 + 1 + 1}

    def test_released_prefixes_go_longest_unused_first(self) -> None:
        batch = batching(kv_blocks=3, prefill_token_s=1.0)
        for now_s, first in ((0.0, 0), (10.0, 50), (20.0, 0)):  # the first is used again
            submit(batch, now_s, prompt=5, length=1, first=first)
            finish(batch)
        submit(batch, 30.0, prompt=5, length=1, first=90)  # needs two of three blocks
        finish(batch)
        assert batch.prefix_hit_tokens == 4
        kept = submit(batch, 40.0, prompt=5, length=1, first=0)
        assert finish(batch) == {kept: 40.0 + 2}
        gone = submit(batch, 50.0, prompt=5, length=1, first=50)
        assert finish(batch) == {gone: 50.0 + 6}

    def test_what_never_fits_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"22 tokens do not fit .* 5 blocks of 4.*kv_blocks"):
            submit(batching(kv_blocks=5), 0.0, prompt=20, length=2)
        batch = batching(kv_blocks=5)
        submit(batch, 0.0, prompt=20, length=1)
        assert len(finish(batch)) == 1


class TestInterference:
    def test_a_cancel_frees_place_and_blocks_at_once(self) -> None:
        batch = batching(max_num_seqs=1)
        first, second = (submit(batch, 0.0, prompt=8, length=9, first=n) for n in (0, 50))
        batch.cancel(2.5, first)
        assert (batch.running, batch.kv_usage) == (0, 0)
        # The step that ran ends at 3.0.
        assert finish(batch) == {second: 3.0 + 9}

    def test_one_that_waits_can_be_cancelled(self) -> None:
        batch = batching(kv_blocks=4)
        requests = [submit(batch, 0.0, prompt=p, length=n, first=f) for p, n, f in ((8, 6, 0), (12, 1, 50), (1, 1, 90))]
        batch.cancel(1.5, requests[1])
        assert finish(batch) == {requests[0]: 6.0, requests[2]: 3.0}

    def test_cancelling_twice_or_too_late_changes_nothing(self) -> None:
        batch = batching()
        request = submit(batch, 0.0, prompt=1, length=2)
        batch.cancel(5.0, request)
        assert batch.advance(5.0) == [request]

    def test_a_cancel_in_a_pause_lets_the_next_one_in_after_it(self) -> None:
        batch = batching(max_num_seqs=1)
        first, second = (submit(batch, 0.0, prompt=1, length=2, first=n) for n in (0, 50))
        batch.pause(0.5)
        batch.cancel(3.0, first)
        assert (batch.running, batch.waiting, batch.next_event_s()) == (0, 1, None)
        batch.resume(10.5)
        assert finish(batch) == {second: 11.0 + 2}

    def test_time_stands_still_in_a_pause(self) -> None:
        batch = batching()
        request = submit(batch, 0.0, prompt=1, length=4)
        batch.pause(2.25)
        assert batch.made(50.0, request) == 2
        late = submit(batch, 60.0, prompt=1, length=1, first=50)
        assert batch.next_event_s() is None and batch.waiting == 1
        batch.resume(102.25)
        assert finish(batch) == {request: 104.0, late: 104.0}

    def test_new_weights_compute_what_was_cached_again(self) -> None:
        batch = batching(prefill_token_s=1.0)
        request = submit(batch, 0.0, prompt=8, length=5)  # its first token at 9.0
        batch.pause(11.5)
        batch.change_weights(12.0, version=7)
        assert (batch.running, batch.waiting, batch.kv_usage, batch.preemptions) == (0, 1, 0, 0)
        batch.resume(20.0)
        # Three tokens were made; eleven have to be computed for the fourth.
        assert finish(batch) == {request: 20.0 + 12 + 1}
        assert request.changes == [(3, 7)]
        again = submit(batch, 50.0, prompt=8, length=1)
        batch.change_weights(50.5, version=8)
        assert finish(batch) == {again: 50.5 + 9}, "nothing of the old weights is known, and the step is lost"
        assert again.changes == [(0, 8)]


@dataclass
class Load:
    """A random engine and what is asked of it."""

    config: BatchingConfig
    asked: list[tuple[float, int, int, int, float | None]] = field(default_factory=list)
    """When, prompt tokens, answer tokens, which of three prompts, and when it is given up."""
    pauses: list[tuple[float, float, bool]] = field(default_factory=list)
    """When, for how long, and whether the weights change in it."""


@st.composite
def loads(draw: Any) -> Load:
    config = BatchingConfig(
        step_s=draw(st.sampled_from([0.5, 1.0])),
        request_s=draw(st.sampled_from([0.0, 0.25])),
        kv_token_s=draw(st.sampled_from([0.0, 0.0625])),
        prefill_token_s=draw(st.sampled_from([0.0, 0.125])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(6, 30)),
        kv_blocks=draw(st.integers(8, 20)),
        block_size=draw(st.sampled_from([3, 4, 5])),
        prefix_caching=draw(st.booleans()),
    )
    asked = st.tuples(
        st.integers(0, 40).map(float), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2),
        st.none() | st.integers(0, 60).map(lambda n: n + 0.3),
    )  # fmt: skip
    pauses = st.tuples(st.integers(0, 40).map(lambda n: n + 0.6), st.integers(1, 9).map(float), st.booleans())
    loads_asked = sorted(draw(st.lists(asked, min_size=1, max_size=12)), key=lambda a: a[0])
    return Load(config, loads_asked, draw(st.lists(pauses, max_size=2)))


def play(load: Load, step_s: float | None = None) -> tuple[ContinuousBatching, list[BatchedRequest], list[str]]:
    """Ask it all; look at the invariants at each event, or at each `step_s` besides."""
    batch, log = ContinuousBatching(load.config), []
    requests: list[BatchedRequest] = []
    changes: list[tuple[float, int, str]] = []
    for number, (at, _, _, _, given_up) in enumerate(load.asked):
        changes.append((at, number, "submit"))
        if given_up is not None:
            changes.append((at + given_up, number, "cancel"))
    for number, (at, seconds, _) in enumerate(load.pauses):
        changes += [(at, number, "pause"), (at + seconds / 2, number, "weights"), (at + seconds, number, "resume")]
    changes.sort()
    now_s = 0.0
    while changes or batch.next_event_s() is not None:
        due = [t for t in (batch.next_event_s(), changes[0][0] if changes else None) if t is not None]
        now_s = min([*due, now_s + step_s]) if step_s else min(due)
        for request in batch.advance(now_s):
            log.append(f"end {requests.index(request)} {request.finished_s:.9f}")
        while changes and changes[0][0] <= now_s:
            _, number, what = changes.pop(0)
            if what == "submit":
                _, prompt, length, which, _ = load.asked[number]
                requests.append(batch.submit(now_s, tokens(prompt, 1000 * which), tokens(length, 100 * number + 5000)))
            elif what == "pause":
                batch.pause(now_s)
            elif what == "resume":
                batch.resume(now_s)
            elif what == "weights":
                if load.pauses[number][2]:
                    batch.change_weights(now_s, number)
            elif requests[number].finished_s is None:
                batch.cancel(now_s, requests[number])
                log.append(f"cancel {number}")
        assert batch.running <= load.config.max_num_seqs
        assert 0 <= batch.kv_usage <= 1
        held: set[int] = set()
        own = 0
        for request in batch._running:
            made = batch.made(now_s, request)
            assert 0 <= made < request.length
            context = request.prompt_tokens + max(made, request._made) if request._decodes else request._to_compute
            own += -(-context // load.config.block_size) - len(request._shared)
            held |= set(request._shared)
        assert batch._kv.used == own + len(held), "blocks are those of the running requests, shared ones once"
    return batch, requests, log


class TestEveryLoad:
    @settings(max_examples=1000 if LONG else 50, deadline=None)
    @given(loads())
    def test_everything_ends_and_nothing_is_left(self, load: Load) -> None:
        batch, requests, log = play(load)
        assert len(log) == len(requests) == len(load.asked)
        assert (batch.running, batch.waiting, batch.kv_usage, batch.next_event_s()) == (0, 0, 0.0, None)
        assert batch._decoding == batch._context_tokens == sum(batch._needing) == 0

    @settings(max_examples=300 if LONG else 20, deadline=None)
    @given(loads(), st.sampled_from([0.1, 0.37]))
    def test_looking_more_often_changes_nothing(self, load: Load, step_s: float) -> None:
        assert play(load)[2] == play(load, step_s)[2]

    @settings(max_examples=300 if LONG else 20, deadline=None)
    @given(loads())
    def test_first_come_first_served(self, load: Load) -> None:
        load.asked = [(at, prompt, 3, which, None) for at, prompt, _, which, _ in load.asked]
        load.config, load.pauses = load.config.model_copy(update={"kv_blocks": 1000}), []
        _, requests, _ = play(load)
        ends = [request.finished_s for request in requests]
        assert ends == sorted(ends)  # type: ignore[type-var]

    @settings(max_examples=10, deadline=None)
    @given(st.floats(0.01, 1), st.floats(0, 1))
    def test_throughput_rises_with_the_batch_until_its_limit(self, step_s: float, request_s: float) -> None:
        def tokens_per_s(requests: int) -> float:
            batch = batching(step_s=step_s, request_s=request_s, max_num_seqs=6, prefix_caching=False)
            for number in range(requests):
                submit(batch, 0.0, 2, 60, first=100 * number)
            return requests * 60 / max(finish(batch).values())

        rates = [tokens_per_s(requests) for requests in (1, 2, 4, 6)]
        assert rates == sorted(rates)
        assert rates[-1] <= tokens_per_s(12) <= 6 / (step_s + 6 * request_s) * 1.001


def test_a_step_of_many_costs_no_more_than_a_step_of_few() -> None:
    """What happens is counted in events, not in tokens: 400,000 of them are made in a handful."""
    batch = batching(max_num_seqs=400, kv_blocks=110_000, max_num_batched_tokens=100_000, prefix_caching=False)
    for number in range(400):
        submit(batch, 0.0, 8, 1000, first=10_000 * number)
    events = 0
    while batch.next_event_s() is not None:
        batch.advance(batch.next_event_s())  # type: ignore[arg-type]
        events += 1
    assert events <= 5


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"step_s": 0.0}, "greater than 0"),
        ({"max_num_seqs": 300, "max_num_batched_tokens": 256}, "256 is less than max_num_seqs 300"),
        ({"max_seqs": 3}, "Extra inputs"),
    ],
)
def test_limits_that_cannot_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BatchingConfig(**{"step_s": 1.0, **keys})


def test_a_hash_stands_for_all_tokens_before_it() -> None:
    hashes = prefix_hashes(tokens(11), 4)
    assert len(hashes) == 2 and prefix_hashes(tokens(7), 4) == hashes[:1]
    assert prefix_hashes(tokens(11), 4, known=hashes[:1]) == hashes
    assert prefix_hashes(np.concatenate([tokens(4, 9), tokens(4, 4)]), 4)[1] != hashes[1]


def test_blocks_that_two_hold_are_released_by_the_second() -> None:
    kv = KvBlocks(4)
    kv.take(2)
    assert kv.name([11, 12]) == [11, 12] and kv.name([11, 13]) == [13]
    kv.share([11])
    kv.release([11, 12], unnamed=0)
    assert (kv.used, kv.known([11, 12]), kv.cost([11, 12])) == (1, 2, 1)
