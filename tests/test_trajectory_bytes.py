"""A trajectory survives its bytes: whole, equal in every field, and without being written twice."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.trajectory_bytes import pack, unpack
from raygym.types import EpisodeStatus, FailureKind, Sampling, Task, Trajectory, Turn

texts = st.text(max_size=8)
floats = st.floats(allow_nan=False, width=32)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    failure = draw(st.none() | st.sampled_from(FailureKind))
    ended = st.sampled_from([EpisodeStatus.TERMINATED, EpisodeStatus.TRUNCATED])
    return Trajectory(
        task=Task(draw(st.integers(0, 9)), draw(texts), draw(st.integers(0, 2**63)), draw(texts)),
        group_id=draw(texts),
        episode=draw(st.integers(0, 9)),
        attempt=draw(st.integers(0, 9)),
        status=EpisodeStatus.FAILED if failure else draw(ended),
        token_ids=rng.integers(0, 2**31 - 1, length).astype(np.int32),
        loss_mask=rng.random(length) < 0.5,
        logprobs=-rng.random(length).astype(np.float32),
        weight_versions=rng.integers(-1, 5, length).astype(np.int32),
        turns=tuple(
            draw(st.lists(st.builds(Turn, *[st.integers(0, 9)] * 2, floats, texts, floats, floats), max_size=3))
        ),
        reward=draw(floats),
        messages=tuple(draw(st.lists(st.dictionaries(texts, texts, max_size=2), max_size=3))),
        sampling=draw(st.builds(Sampling, st.floats(0, 2), st.integers(1, 9), st.none() | st.integers(0, 9))),
        drifted=draw(st.booleans()),
        failure=failure,
        failure_detail=draw(texts),
        metrics=draw(st.dictionaries(texts, floats, max_size=2)),
        reward_components=draw(st.dictionaries(texts, floats, max_size=2)),
    )


def assert_same(left: Trajectory, right: Trajectory) -> None:
    for name in [f.name for f in fields(Trajectory) if f.compare]:
        ours, theirs = getattr(left, name), getattr(right, name)
        assert type(ours) is type(theirs), name
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs, name


@settings(max_examples=25)
@given(trajectories())
def test_every_field_comes_back(trajectory: Trajectory) -> None:
    assert_same(trajectory, unpack(pack(trajectory)))
    assert_same(trajectory, pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(trajectory)))))


@settings(max_examples=25)
@given(trajectories())
def test_a_changed_copy_has_its_own_bytes(trajectory: Trajectory) -> None:
    changed = replace(unpack(pack(trajectory)), group_id="another")
    assert pickle.loads(pickle.dumps(changed)).group_id == "another"


@settings(max_examples=25)
@given(trajectories())
def test_what_came_as_bytes_leaves_as_the_same_bytes(trajectory: Trajectory) -> None:
    packed = pack(trajectory)
    assert pack(unpack(packed)) is packed


@settings(max_examples=25)
@given(trajectories())
def test_its_arrays_cannot_be_written_to(trajectory: Trajectory) -> None:
    assert not any(getattr(unpack(pack(trajectory)), name).flags.writeable for name in ("token_ids", "loss_mask"))
