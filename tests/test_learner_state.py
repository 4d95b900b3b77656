"""The files of a learner's state, on a stand-in for the engine: shards, other policies, damage, bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from raygym.errors import LearnerStateError
from raygym.learner_state import KINDS, Gang, load_learner_state, save_learner_state

ALONE = Gang()


class Tensors:
    """A `TrainState` that is a dictionary."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._shapes = shapes
        self.values = {(n, k): torch.randn(s, generator=generator) for n, s in shapes.items() for k in KINDS}
        self.steps, self.ended = seed, False

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, kind: str) -> Tensor:
        return self.values[name, kind]

    def write(self, name: str, kind: str, value: Tensor) -> None:
        assert value.dtype == torch.float32
        self.values[name, kind] = value

    def optimizer_steps(self) -> int:
        return self.steps

    def begin_write(self, optimizer_steps: int) -> None:
        self.steps = optimizer_steps

    def end_write(self) -> None:
        self.ended = True


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.dictionaries(
        st.from_regex(r"[a-z]{1,3}\.weight", fullmatch=True),
        st.lists(st.integers(1, 5), max_size=3).map(tuple),
        min_size=1,
        max_size=6,
    ),
    shard_bytes=st.integers(1, 2000),
)
def test_what_is_loaded_is_what_was_saved_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("state") / "training_state"
    saved, loaded = Tensors(shapes, 7), Tensors(shapes, 8)
    saved.values[next(iter(shapes)), "weight"].fill_(float.fromhex("0x1.000002p-126"))
    torch.manual_seed(3)
    save_learner_state(folder, saved, 5, ALONE, shard_bytes)
    expected = torch.rand(4)
    torch.manual_seed(4)
    assert load_learner_state(folder, loaded, ALONE) == 5
    assert torch.equal(torch.rand(4), expected), "the random generator goes on as well"
    assert loaded.steps == 7 and loaded.ended
    for key, value in saved.values.items():
        assert value.numpy().tobytes() == loaded.values[key].numpy().tobytes(), key
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            assert len(names) == 1 or sum(file.get_tensor(name).nbytes for name in names) <= shard_bytes


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": (2, 3)}, r"it has also b and is of another policy"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, r"it lacks c and is of another policy"),
        ({"a": (2, 3), "b": (5,)}, r"b has shape \(4,\) in it and \(5,\) in the learner's policy"),
    ],
)
def test_another_policy_is_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    save_learner_state(tmp_path, Tensors({"a": (2, 3), "b": (4,)}, 1), 0, ALONE)
    state = Tensors(shapes, 2)
    with pytest.raises(LearnerStateError, match=words):
        load_learner_state(tmp_path, state, ALONE)
    assert state.steps == 2 and not state.ended, "nothing was changed"


def test_files_that_are_not_there_or_of_the_future_are_told(tmp_path: Path) -> None:
    state = Tensors({"a": (2,)}, 1)
    with pytest.raises(LearnerStateError, match=r"learner.json"):
        load_learner_state(tmp_path, state, ALONE)
    save_learner_state(tmp_path, state, 0, ALONE)
    index = json.loads((tmp_path / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(LearnerStateError, match="its format is 2, this raygym reads 1"):
        load_learner_state(tmp_path, state, ALONE)
    (tmp_path / "learner.json").write_text(json.dumps(index))
    (tmp_path / "learner-00000.safetensors").unlink()
    with pytest.raises(LearnerStateError, match="learner-00000"):
        load_learner_state(tmp_path, state, ALONE)
